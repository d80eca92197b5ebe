"""The one place that writes to the terminal: results to stdout, everything else to stderr; and how
a number is written.

A verb shows nothing: it tells how far it is as a `Step`, to whoever watches. On a terminal that is
a bar with rate and time left; without one, a plain line now and then. Of several processes of one
launch the first speaks for all; the others are muted.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
MINUS = "\N{MINUS SIGN}"
_PLAIN_SECONDS = 10.0
_LEAST_BAR = 10  # columns
_quiet = False
_said: dict[str, object] = {}  # what `note_once` has told


@dataclass(frozen=True)
class Step:
    """How far a verb is: `done` of `total` units of what is called `label`; or a note.

    detail: what else is known of it, as the loss of this update.
    """

    done: int = 0
    total: int = 0
    label: str = ""
    unit: str = ""
    note: str = ""
    detail: str = ""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Progress that nobody watches."""


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


def _stderr() -> Any:
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

        _stderr().print(Text.assemble(("warning: ", "yellow"), text))


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


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr: first column left-aligned, the others right-aligned."""
    if _quiet:
        return
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
    _stderr().print(sheet)


class _Display:
    """Steps of one label as they come: a bar on a terminal, else a plain line now and then."""

    def __init__(self, step: Step, stack: contextlib.ExitStack) -> None:
        self.label = step.label
        self.bar: Any = None
        self._began, self._first = time.monotonic(), step.done  # a resumed run starts above 0
        self._shown, self._last = self._began, -1  # when a plain line was printed, and of what
        if not _quiet and sys.stderr.isatty():
            from rich import progress as rich

            self.bar = rich.Progress(
                rich.TextColumn("{task.description}"), rich.BarColumn(bar_width=None),
                rich.MofNCompleteColumn(), rich.TextColumn("{task.fields[rate]}"),
                rich.TextColumn("{task.fields[note]}"), rich.TimeRemainingColumn(),
                console=_stderr(),
            )  # fmt: skip
            stack.enter_context(self.bar)
            self.bar.add_task(step.label, total=step.total, rate="", note="")

    def show(self, step: Step) -> None:
        now = time.monotonic()
        elapsed, moved = now - self._began, step.done - self._first
        speed = moved / elapsed if moved and elapsed > 0 else 0.0
        number = f"{speed:.3g}" if speed < 1000 else f"{speed:.0f}"  # no 1.36e+03
        rate = f"{number} {step.unit}/s" if speed else ""
        if self.bar is not None:  # label, counts, rate and time left are shown whole
            whole = f"{self.label}  {step.total}/{step.total} {rate}  0:00:00"
            room = max(self.bar.console.width - len(whole) - _LEAST_BAR, 0)
            detail = step.detail
            if len(detail) > room:
                detail = f"{detail[: max(room - 1, 0)]}…"
            self.bar.update(
                self.bar.task_ids[0], completed=step.done, total=step.total, rate=rate, note=detail
            )
            return
        is_time = now - self._shown >= _PLAIN_SECONDS or step.done >= step.total
        if is_time and step.done != self._last and not _quiet:
            self._shown, self._last = now, step.done
            parts = [f"{self.label}: {step.done}/{step.total}", rate, step.detail]
            print("  ".join(filter(None, parts)), file=sys.stderr, flush=True)


@contextlib.contextmanager
def showing() -> Iterator[Progress]:
    """Show the steps that a verb tells: a bar for each label, notes as lines.

    What has a label and cannot be counted is a line on a terminal, while it lasts.
    """
    display: _Display | None = None
    with contextlib.ExitStack() as stack:

        def show(step: Step) -> None:
            nonlocal display
            if step.note:  # a line that stays, above the bar where there is one
                (display.bar.console.print if display and display.bar else note)(step.note)
            if not step.label:
                return
            if display is None or display.label != step.label or not step.total:
                stack.close()
                display = None
            if step.total:
                if display is None:
                    display = _Display(step, stack)
                display.show(step)
            elif sys.stderr.isatty() and not _quiet:
                stack.enter_context(_stderr().status(step.label, spinner_style=""))

        yield show


def decimals(values: Iterable[float], figures: int) -> int:
    """Digits after the point for all numbers of a column: `figures` of the smallest of them, of
    those that are not a thousand times smaller than the largest."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes:
        return figures
    least = max(min(sizes), max(sizes) / 1000)
    return min(max(figures - 1 - math.floor(math.log10(least)), 0), 9)


def fixed(value: float, digits: int, sign: str = "") -> str:
    """With `digits` after the point and a true minus; a word where it is not finite."""
    if not math.isfinite(value):
        return "not finite"
    form = f",.{digits}f" if abs(value) < 1e9 else ".4g"
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
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    unit = next((unit for unit, size in units.items() if num_bytes >= size), "")
    return f"{num_bytes / units[unit]:.3g} {unit}" if unit else f"{num_bytes} bytes"
