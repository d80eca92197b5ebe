"""The one place that writes to the terminal: results to stdout, everything else to stderr; and how
a number is written.

On a terminal, progress is a bar with rate and time left; without one, a plain line now and then.
Of several processes of one launch the first speaks for all; the others are muted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.progress import Step

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

SCHEMA_VERSION = 1
MINUS = "\N{MINUS SIGN}"
_LARGE = 1e9
_PLAIN_SECONDS = 10.0
_LEAST_BAR = 10  # columns
_quiet = False
_said: dict[str, object] = {}  # what `note_once` has told


def set_quiet(quiet: bool) -> None:
    """Silence everything but results and errors."""
    global _quiet
    _quiet = quiet
    _said.clear()  # another command begins


def is_quiet() -> bool:
    return _quiet


def mute() -> None:
    """Silence this process, libraries and results included; its own failure is still told."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as it runs


def unmute() -> None:
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def stderr_console() -> Any:
    """A rich console on stderr; it honours NO_COLOR and what the terminal can show."""
    from rich.console import Console

    return Console(stderr=True, quiet=_quiet, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """One line for the person who watches; a terminal that is narrower gets it broken at words."""
    if _quiet:
        return
    if sys.stderr.isatty():
        at_words = textwrap.TextWrapper(
            shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False,
            replace_whitespace=False,
        )  # fmt: skip
        text = "\n".join(at_words.fill(line) for line in text.split("\n"))
    print(text, file=sys.stderr, flush=True)


def note_once(text: str, detail: str = "") -> None:
    """`note`, unless this process has noted `text` before, with whatever detail."""
    mine = object()
    if _said.setdefault(text, mine) is mine:  # one step, for images are decoded in threads
        note(text + detail)


def warn(text: str) -> None:
    if not _quiet:
        from rich.text import Text

        stderr_console().print(Text.assemble(("warning: ", "yellow"), text))


def error(text: str) -> None:
    """One line that says what was wrong; shown even with --quiet."""
    print(f"deme: {text}", file=sys.stderr, flush=True)


def result_paths(paths: Sequence[Path], *, as_json: bool, **measured: Any) -> None:
    """The paths a command wrote, one per line, or as one JSON document with what it measured."""
    if as_json:
        result_json({"paths": [str(path) for path in paths], **measured})
    else:
        for path in paths:
            print(path, flush=True)


def result_json(document: dict[str, Any]) -> None:
    """Exactly one JSON document on stdout."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **document}, indent=2), flush=True)


def decimals(values: Iterable[float], figures: int) -> int:
    """Digits after the point for all numbers of a column: `figures` of the smallest of them, of
    those that are not a thousand times smaller than the largest."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes:
        return figures
    least = max(min(sizes), max(sizes) / 1000)
    return min(max(figures - 1 - math.floor(math.log10(least)), 0), 9)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr: first column left-aligned, the others right-aligned."""
    from rich import box
    from rich.table import Table

    sheet = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold",
        collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    for index, column in enumerate(columns):
        sheet.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        sheet.add_row(*row)
    stderr_console().print(sheet)


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """On a terminal, a line that says what takes its time, gone when it is over."""
    if _quiet or not sys.stderr.isatty():
        yield
        return
    with stderr_console().status(text, spinner_style=""):
        yield


class Progress:
    """How far a procedure is: `advance(done, note)` with `done` out of `total` units."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._start: tuple[float, int] | None = None
        self._shown, self._last = time.monotonic(), -1  # when a plain line was printed, and of what
        self._bar = self._open_bar() if not _quiet and sys.stderr.isatty() else None

    def _open_bar(self) -> Bar:
        """A bar on the terminal, with one task."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        bar = Bar(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(), console=stderr_console(),
        )  # fmt: skip
        bar.start()
        bar.add_task(self.label, total=self.total, rate="", note="")
        return bar

    def advance(self, done: int, note: str = "", *, total: int | None = None) -> None:
        """Show that `done` units are finished (a resumed run starts above 0).

        total: of units, where it is known only now.
        """
        now = time.monotonic()
        self.total = self.total if total is None else total
        if self._start is None:
            self._start = (now, done)
        elapsed, moved = now - self._start[0], done - self._start[1]
        speed = moved / elapsed if moved and elapsed > 0 else 0.0
        shown = f"{speed:.3g}" if speed < 1000 else f"{speed:.0f}"  # no 1.36e+03
        if speed >= 1e6:
            shown = f"{speed / 1e6:.0f} million"
        rate = f"{shown} {self.unit}/s" if speed else ""
        if self._bar is not None:
            note = self._fitting(note, rate)
            self._bar.update(
                self._bar.task_ids[0], completed=done, total=self.total, rate=rate, note=note
            )
        elif (
            not _quiet
            and done != self._last
            and (now - self._shown >= _PLAIN_SECONDS or done >= self.total)
        ):
            self._shown, self._last = now, done
            parts = [f"{self.label}: {done}/{self.total}", rate, note]
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def _fitting(self, note: str, rate: str) -> str:
        """What of a note there is room for: label, counts, rate and time left are shown whole."""
        assert self._bar is not None
        rest = f"{self.label}  {self.total}/{self.total} {rate}  0:00:00"
        room = self._bar.console.width - len(rest) - _LEAST_BAR
        return note if len(note) <= room else f"{note[: max(room - 1, 0)]}…"

    def say(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            note(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def progress(label: str, total: int, unit: str = "it") -> Iterator[Progress]:
    """A progress display that is closed whatever happens."""
    display = Progress(label, total, unit)
    try:
        yield display
    finally:
        display.close()


@contextlib.contextmanager
def showing() -> Iterator[Callable[[Step], None]]:
    """Show the steps that a verb tells: a bar for each label, notes as lines.

    What has a label and cannot be counted is a line on a terminal, while it lasts.
    """
    bar: Progress | None = None
    with contextlib.ExitStack() as stack:

        def show(step: Step) -> None:
            nonlocal bar
            if step.note:
                (note if bar is None else bar.say)(step.note)
            if step.label and not step.total:
                stack.close()
                bar = None
                stack.enter_context(waiting(step.label))
            elif step.label:
                if bar is None or bar.label != step.label:
                    stack.close()
                    bar = stack.enter_context(progress(step.label, step.total, step.unit))
                bar.advance(step.done, step.detail, total=step.total)

        yield show


def fixed(value: float, digits: int, sign: str = "") -> str:
    """With `digits` after the point and a true minus; a word where it is not finite."""
    if not math.isfinite(value):
        return "not finite"
    form = f",.{digits}f" if abs(value) < _LARGE else ".4g"
    return f"{value:{sign}{form}}".replace("-", MINUS)


def signed(value: float, digits: int) -> str:
    return fixed(value, digits, "+")


def plain(value: float | None) -> str:
    """A lone number in four figures; a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    if not math.isfinite(value):
        return "not finite"
    is_whole = value == int(value) and abs(value) < 1e15
    return (f"{int(value):,}" if is_whole else f"{value:.4g}").replace("-", MINUS)


def size_of(num_bytes: int) -> str:
    """Bytes as a person reads them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"
