"""How `deme eval` shows its figures: a table, and the protocol under it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deme_cli import console

if TYPE_CHECKING:
    from deme_cli.api.evaluating import Evaluation, Figures
    from deme_cli.evaluation.summary import Figure


def show(measured: Evaluation) -> None:
    """The table, and under it what its figures depend on."""
    figures = measured.figures
    first = next(iter(figures))
    paired = any(figure.difference for row in figures.values() for figure in row.values())
    columns = [("row", list(figures))]
    for metric in figures[first]:
        column = [row[metric] for row in figures.values()]
        columns.append((metric, _values(column)))
        if paired:
            cells = _differences(column, has_room=len(figures[first]) == 1)
            columns.append((f"minus {first}", cells))
    columns.append(("images", [_counts(next(iter(row.values()))) for row in figures.values()]))
    names, cells_of = zip(*columns, strict=True)
    console.table("", names, list(zip(*cells_of, strict=True)))
    for line in (*measured.remarks(), *_truncated(figures)):
        console.note(line)
    if paired:
        where = "in brackets" if len(figures[first]) == 1 else "in --json"
        console.note(
            f"± is the standard deviation over repeats; differences are paired by repeat, "
            f"{where} the 95 % interval of their mean"
        )


def _values(figures: Sequence[Figure]) -> list[str]:
    """A column of figures with their standard deviation over repeats; of a share in one repeat,
    its standard error."""
    errors = [figure.details.get("standard_error") for figure in figures]
    spreads = [f.sd if f.sd is not None else e for f, e in zip(figures, errors, strict=True)]
    known = [spread for spread in spreads if spread]
    digits = console.decimals(known or [figure.value for figure in figures], 2 if known else 4)
    cells = []
    for figure, spread in zip(figures, spreads, strict=True):
        told = f"{figure.value:.{digits}f}"
        if figure.sd is not None:
            told += f" ± {figure.sd:.{digits}f}"
        elif spread is not None:
            told += f" (s.e. {spread:.{digits}f})"
        cells.append(told)
    return cells


def _differences(figures: Sequence[Figure], *, has_room: bool) -> list[str]:
    """A column of differences to the first row; their interval where the terminal has room."""
    found = [figure.difference for figure in figures]
    digits = console.decimals([one.sd for one in found if one], 2)
    cells = []
    for one in found:
        told = "" if one is None else f"{one.mean:+.{digits}f} ± {one.sd:.{digits}f}"
        if one and has_room:
            low, high = one.interval
            told += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
        cells.append(told)
    return cells


def _counts(figure: Figure) -> str:
    repeats = len(figure.values)
    return f"{figure.n}" + (f" x {repeats}" if repeats > 1 else "")


def _truncated(figures: Figures) -> Iterator[str]:
    """Which rows have prompts that are longer than CLIP's context."""
    for name, row in figures.items():
        for figure in row.values():
            if count := figure.details.get("truncated"):
                yield f"{name}: CLIP reads {count} of {figure.n} prompts without their end"
