"""How `deme eval` shows its figures: a table and its protocol on stderr, a document, a gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.errors import GateError

if TYPE_CHECKING:
    from deme_cli.evaluation.summary import Figure

Figures = Mapping[str, "Mapping[str, Figure]"]  # by row and metric
Cards = Mapping[str, Mapping[str, Any]]  # by row


def document_of(figures: Figures, kinds: Mapping[str, str], cards: Cards) -> dict[str, Any]:
    """The rows as `--json` and `--output` give them."""
    return {
        "rows": [
            {
                "name": name,
                "kind": kinds[name],
                "metrics": {metric: figure.document for metric, figure in row.items()},
                "protocol": cards[name],
            }
            for name, row in figures.items()
        ]
    }


def show(figures: Figures, cards: Cards) -> None:
    """The table, and under it what its figures depend on."""
    from deme_cli.evaluation.protocol import describe_cards

    first = next(iter(figures))
    paired = any(figure.difference for row in figures.values() for figure in row.values())
    columns = ["row"]
    for metric in figures[first]:
        columns += [metric, f"minus {first}"] if paired else [metric]
    lines = [[name, *_cells(row, paired=paired)] for name, row in figures.items()]
    console.table("", [*columns, "images"], lines)
    for line in (*describe_cards(cards), *_truncated(figures)):
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


def require_gate(figures: Figures, metric: str, max_fid: float | None) -> None:
    """Raises GateError if a row's distance is above the one allowed."""
    if max_fid is None:
        return
    above = [
        f"{name} {row[metric].value:.4g}"
        for name, row in figures.items()
        if row[metric].value > max_fid
    ]
    if above:
        raise GateError(f"{metric} above --max-fid {max_fid:g}: {', '.join(above)}")
