"""How a search is shown while it runs: a screen of text kept up to date, on a terminal.

It tells the rung and its objective, trials done and time left, the best coefficients, how the
objective fell, and the last trials. Without a terminal each trial is a line. Of a point with
several groups one number per expert is shown. It only shows: nothing is decided here.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.merging.search.trials import BASE_NAME, MEAN_NAME

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

    from deme_cli.merging.search.trials import Trial

Line = list[tuple[str, str]]  # pieces of text, each with its style
_REFRESHES = 2  # per second
_PLAIN_SECONDS = 10.0  # between lines about one long trial, without a terminal
_MOST_BARS, _CURVE_ROWS, _LAST_TRIALS = 6, 4, 6
_MOST_NUMBERS = 8  # coefficients named in a line about one trial
_BLOCKS, _ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " ...:::##"  # empty to full
_FULL, _LINE, _REST = 0, 1, 2
_SIGNS, _ASCII_SIGNS = "█━─", "#=-"  # a bar of a coefficient, what is done, what is not


class SearchView:
    """A context manager: `add` each trial as it ends; `progress` within one, `note` in between.

    labels: the experts, or what else the numbers of a point are called; summary: these numbers of a
    point with more (`Space.summary`); total: how many trials there will be, None where unknown.
    """

    def __init__(
        self, labels: Sequence[str], objectives: Sequence[str], total: int | None = None, *,
        name: str = "search", summary: Callable[[tuple[float, ...]], Sequence[float]] | None = None,
        screen: Console | None = None,
    ) -> None:  # fmt: skip
        self.labels, self.objectives, self.total, self.name = labels, objectives, total, name
        self.trials: list[Trial] = []
        self._best: dict[int, Trial] = {}  # by rung
        self._summary = summary or (lambda point: point)
        self._inner: tuple[int, int, str] | None = None
        self._began = self._changed = self._told = time.monotonic()
        self._finished = False
        self._screen = screen or console.stderr_console()
        self._live: Any = None

    def __enter__(self) -> SearchView:
        self._began = self._changed = time.monotonic()
        if (
            not console.is_quiet()
            and self._screen.file.isatty()
            and not self._screen.is_dumb_terminal
        ):
            from rich.live import Live

            self._live = Live(
                self, console=self._screen, refresh_per_second=_REFRESHES, redirect_stdout=False,
                vertical_overflow="crop",
            )  # fmt: skip
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished = True
        if self._live is not None:
            self._live.stop()

    def add(self, trial: Trial) -> None:
        """Show a finished trial."""
        self.recall([*self.trials, trial])
        self._inner = (0, *self._inner[1:]) if self._inner else None  # the next one takes its line
        self._changed = time.monotonic()
        if self._live is None:
            console.note(self._plain(trial))

    def recall(self, trials: Sequence[Trial]) -> None:
        """What is known by now: trials of an earlier run, or of other processes, in any order."""
        self.trials, self._best = list(trials), {}
        for trial in trials:
            best = self._best.get(trial.rung, trial)
            if math.isfinite(trial.objective) and trial.objective <= best.objective:
                self._best[trial.rung] = trial

    def progress(self, done: int, total: int, unit: str = "images") -> None:
        """How far the running trial is."""
        self._inner, now = (done, total, unit), time.monotonic()
        if self._live is None and now - max(self._told, self._changed) >= _PLAIN_SECONDS:
            self._told = now
            console.note(f"trial {len(self.trials) + 1}: {done}/{total} {unit}")

    def _plain(self, trial: Trial) -> str:
        """`trial 17/64 loss 0.09312 best 0.09301 at 0.2 0.1 (1.2 s)`, at: where the best lies."""
        total = f"/{self.total}" if self.total else ""
        name = f" ({trial.name})" if trial.name else ""
        value = f"{self._objective(trial.rung)} {_number(trial.objective)}"
        parts = [f"trial {trial.index + 1}{total}{name} {value}"]
        if best := self._best.get(trial.rung):
            mean = "mean " if len(best.point) > len(self.labels) else ""
            parts.append(f"best {_number(best.objective)} at {mean}{self._point(best, '.3g')}")
        return " ".join([*parts, f"({trial.seconds:.1f} s)"])

    def __rich_console__(self, screen: Console, options: ConsoleOptions) -> Iterator[Text]:
        """At most one line less than the terminal has, none wider than it."""
        from rich.text import Text

        width, ascii_only = options.max_width, options.ascii_only
        for line in self._lines(width, screen.size.height - 1, ascii_only):
            text = Text.assemble(*line, no_wrap=True, overflow="crop")
            text.truncate(width, overflow="crop" if ascii_only else "ellipsis")
            yield text

    def _lines(self, width: int, room: int, ascii_only: bool) -> list[Line]:
        """What fits: first the head and the best, then the last trials, then the curve."""
        signs = _ASCII_SIGNS if ascii_only else _SIGNS
        lines = [*self._head(width, signs), *self._best_lines(width, signs)]
        if self._finished or not self.trials:
            return lines[:room]
        curve = self._curve(width, ascii_only)
        last = self._last()
        left = room - len(lines) - 1
        if left - len(curve) - 1 < min(len(last), 3):
            curve = []
        left -= len(curve) + 1 if curve else 0
        for part in (curve, last[-left:] if left > 0 else []):
            lines += [[], *part] if part else []
        return lines[:room]

    def _head(self, width: int, signs: str) -> list[Line]:
        """What is searched, how far it is, and how long it takes."""
        rung = self.trials[-1].rung if self.trials else 0
        of = f" of {self.total}" if self.total else ""
        line: Line = [(self.name, "bold"), (f"  {len(self.trials)}{of} trials  ", "")]
        if len(self.objectives) > 1:
            line.append((f"rung {rung}: ", ""))
        for index, objective in enumerate(self.objectives):
            line += [(" > ", "dim")] * (index > 0)
            line.append((objective, "bold cyan" if index == rung else "dim"))
        elapsed = time.monotonic() - self._began
        left = None if self._finished else self._seconds_left()
        spent = _clock(elapsed) + (f", {_clock(left)} left" if left is not None else "")
        gap = width - sum(len(text) for text, _ in line) - len(spent)
        lines = [[*line, (" " * max(gap, 2) + spent, "")]]
        if self._finished:
            return lines
        if self.total:
            lines.append(_bar(len(self.trials), self.total, width, signs))
        if self._inner:
            done, total, unit = self._inner
            text = f" trial {len(self.trials) + 1}: {done}/{total} {unit}"
            lines.append([*_bar(done, total, max(width // 3, 4), signs), (text, "")])
        return lines

    def _seconds_left(self) -> float | None:
        """The median time of this rung's trials for each that is to come."""
        rung = self.trials[-1].rung if self.trials else 0
        seconds = [t.seconds for t in self.trials if t.rung == rung and t.seconds > 0]
        if not self.total or not seconds:
            return None
        typical = statistics.median(seconds)
        running = min(time.monotonic() - self._changed, typical)
        return max(typical * (self.total - len(self.trials)) - running, 0.0)

    def _best_lines(self, width: int, signs: str) -> list[Line]:
        """The best trial of the highest rung, against the base, and its coefficients."""
        if not self._best:
            return [[], [("no finite objective so far", "yellow")]] if self.trials else []
        rung = max(self._best)
        best = self._best[rung]
        line: Line = [
            (f"best {self._objective(rung)} ", ""),
            (_number(best.objective), "bold green"),
        ]
        line.append((f" at trial {best.index + 1}", ""))
        compared = []
        for name in (BASE_NAME, MEAN_NAME):
            value = next(
                (t.objective for t in self.trials if t.rung == rung and t.name == name), math.inf
            )
            if math.isfinite(value):
                is_ratio = value > 0 and best.objective > 0  # a kernel distance may be negative
                below = f"{1 - best.objective / value:.2%} below " if is_ratio else ""
                compared.append(f"{below}{name} {_number(value)}")
        values = list(self._summary(best.point))
        groups = len(best.point) // max(len(values), 1)
        lines = [[], line]
        if compared:
            lines.append([(", ".join(compared), "")])
        if groups > 1:
            lines.append([(f"w, mean over {groups} groups", "dim")])
        return lines + self._coefficients(values, width, signs)

    def _coefficients(self, values: Sequence[float], width: int, signs: str) -> list[Line]:
        """A bar for each of a few coefficients, the numbers of more, in at most three lines."""
        names = max(map(len, self.labels))
        if len(values) > _MOST_BARS:
            cells = [f"{k:<{names}} {w:5.2f}" for k, w in zip(self.labels, values, strict=True)]
            per_line = max(width // (len(cells[0]) + 3), 1)
            shown = cells[: per_line * 3]
            lines = [
                [("   ".join(shown[i : i + per_line]), "")] for i in range(0, len(shown), per_line)
            ]
            more = len(cells) - len(shown)
            return lines + ([[(f"and {more} more", "dim")]] if more else [])
        largest = max(map(abs, values)) or 1.0
        below = any(w < 0 for w in values)
        half = max((width - names - 12) // (2 if below else 1), 0)
        half = min(half, 30 if below else 50)
        lines = []
        for label, w in zip(self.labels, values, strict=True):
            size = round(abs(w) / largest * half) * signs[_FULL]
            left = f"{size if w < 0 else '':>{half}}" if below else ""
            middle = "|" if below else ""
            lines.append(
                [(f"  {label:<{names}} {w:6.3f} ", ""), (left, "magenta"), (middle, "dim"),
                 (size if w > 0 else "", "cyan")]
            )  # fmt: skip
        return lines

    def _curve(self, width: int, ascii_only: bool) -> list[Line]:
        """How the least objective of the highest rung fell, in block characters."""
        rung = max(self._best, default=0)
        own = [t for t in self.trials if t.rung == rung]
        falls = [t.best for t in own if math.isfinite(t.best)]
        if len(falls) < 2:
            return []
        base = next((t.objective for t in own if t.name == BASE_NAME), math.inf)
        low, high = falls[-1], min(falls[0], max(base, falls[-1]))
        names = [_number(high), *[""] * (_CURVE_ROWS - 2), _number(low)]
        edge = max(map(len, names)) + 1
        columns = max(width - edge, 1)
        spread = [falls[i * len(falls) // columns] for i in range(columns)]
        blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
        rows = _area(spread, low, high, _CURVE_ROWS, blocks)
        return [
            [(f"{name:>{edge - 1}} ", "dim"), (row, "green")]
            for name, row in zip(names, rows, strict=True)
        ]

    def _last(self) -> list[Line]:
        """The last trials, the latest below; those that are the best of their rung stand out."""
        lines = []
        shown = self.trials[-_LAST_TRIALS:]
        wide = len(str(max(trial.index + 1 for trial in shown)))
        for trial in shown:
            style = "green" if self._best.get(trial.rung) is trial else ""
            value = f"{_number(trial.objective):<10}"
            if len(self.objectives) > 1:
                value = f"{self._objective(trial.rung):<{max(map(len, self.objectives))}} {value}"
            text = f"  {trial.index + 1:>{wide}}  {value} {trial.seconds:6.1f} s  "
            lines.append([(text, style), (trial.name or self._point(trial, "5.2f"), style)])
        return lines

    def _point(self, trial: Trial, form: str) -> str:
        values = list(self._summary(trial.point))
        shown = values if len(values) <= _MOST_NUMBERS else values[: _MOST_NUMBERS - 2]
        more = f" and {len(values) - len(shown)} more" if len(values) > len(shown) else ""
        return " ".join(f"{w:{form}}" for w in shown) + more

    def _objective(self, rung: int) -> str:
        return self.objectives[min(rung, len(self.objectives) - 1)]


def _bar(done: int, total: int, width: int, signs: str) -> Line:
    full = min(done * width // max(total, 1), width)
    return [(signs[_LINE] * full, "cyan"), (signs[_REST] * (width - full), "dim")]


def _area(values: Sequence[float], low: float, high: float, rows: int, blocks: str) -> list[str]:
    """Columns as high as the values, `low` an eighth of a row; values above `high` are cut."""
    steps = 8 * rows
    share = [min((v - low) / (high - low), 1.0) if high > low else 0.0 for v in values]
    heights = [1 + round(part * (steps - 1)) for part in share]
    return [
        "".join(blocks[max(0, min(height - 8 * row, 8))] for height in heights)
        for row in reversed(range(rows))
    ]


def _number(value: float) -> str:
    return f"{value:.5g}" if math.isfinite(value) else "not finite"


def _clock(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
