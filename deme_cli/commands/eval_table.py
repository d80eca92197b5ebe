"""How `deme eval` shows its figures: a table, and the protocol under it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from deme_cli import console

if TYPE_CHECKING:
    from deme_cli.api.evaluating import Evaluation, Figure, Figures


def show(measured: Evaluation) -> None:
    """The table, and under it what its figures depend on."""
    figures = measured.figures
    first = next(iter(figures))
    paired = any(figure.difference for row in figures.values() for figure in row.values())
    columns = ["row"]
    for metric in figures[first]:
        columns += [metric, f"minus {first}"] if paired else [metric]
    lines = [[name, *_cells(row, paired=paired)] for name, row in figures.items()]
    console.table("", [*columns, "images"], lines)
    for line in (*measured.remarks(), *_truncated(figures)):
        console.note(line)
    if paired:
        where = "in brackets" if len(figures[first]) == 1 else "in --json"
        console.note(
            f"± is the standard deviation over repeats; differences are paired by repeat, "
            f"{where} the 95 % interval of their mean"
        )


def _cells(row: Mapping[str, Figure], *, paired: bool) -> Iterator[str]:
    """A figure and, where rows are paired, its difference to the first row; then the counts.

    The interval of a difference is left out where several metrics share the width of a terminal.
    """
    for figure in row.values():
        yield f"{figure.value:.4g}{_spread(figure)}"
        if paired and (difference := figure.difference) is not None:
            low, high = difference.interval
            interval = f" [{low:+.2g}, {high:+.2g}]" if len(row) == 1 else ""
            yield f"{difference.mean:+.3g} ± {difference.sd:.2g}{interval}"
        elif paired:
            yield ""
    repeats = len(figure.values)
    yield f"{figure.n}" + (f" x {repeats}" if repeats > 1 else "")


def _spread(figure: Figure) -> str:
    """The standard deviation over repeats; of a share in one repeat, its standard error."""
    if figure.sd is not None:
        return f" ± {figure.sd:.2g}"
    error = figure.details.get("standard_error")
    return "" if error is None else f" (s.e. {error:.2g})"


def _truncated(figures: Figures) -> Iterator[str]:
    """Which rows have prompts that are longer than CLIP's context."""
    for name, row in figures.items():
        for figure in row.values():
            if count := figure.details.get("truncated"):
                yield f"{name}: CLIP reads {count} of {figure.n} prompts without their end"
