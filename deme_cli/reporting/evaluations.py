"""The table that `deme eval --output` left: what it measured, and what may be said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deme_cli.console import number
from deme_cli.reporting.measures import Measure, verdict
from deme_cli.reporting.tables import (
    Cell,
    Results,
    Table,
    add_columns,
    cards_of,
    difference_of,
    metric_cells,
    metric_columns,
)

_NOTE = (
    "± is the standard deviation over repeats. Differences are paired by repeat, for rows of one "
    "repeat share their starting noise; in brackets the 95 % interval of their mean (Student's t). "
    "Intervals are not corrected for the number of rows, nor for choosing the best of them. "
    "Repeats are seeds of the evaluation: they tell nothing of how training varies."
)


def evaluation(name: str, document: Mapping[str, Any]) -> Results:
    """What an evaluation says. Raises LookupError, TypeError or ValueError on another shape."""
    rows = document["rows"]
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["metrics"]))
    if not rows or not metrics:
        raise ValueError("it has no rows")
    measured = {metric: list(_measures(rows, metric)) for metric in metrics}
    is_paired = any(m.difference for measures in measured.values() for m in measures)
    columns, cells = ["row"], [[Cell(str(row["name"]), note=str(row["kind"]))] for row in rows]
    counts: dict[str, list[Cell]] = {}
    for metric, measures in measured.items():
        headings = metric_columns(metric, metric, measures)
        add_columns(columns, cells, headings, metric_cells(metric, measures))
        for measure in measures:
            counts.setdefault(measure.row, [Cell(_counts(measure))])
    add_columns(columns, cells, ["images"], counts)
    cards = [(str(row["name"]), row.get("protocol") or {}) for row in rows]
    return Results(
        name, f"Evaluation, {name}",
        [verdict(metric, measures) for metric, measures in measured.items()],
        Table(f"Rows of {name}", columns, cells),
        [*([_NOTE] if is_paired else []), *_protocol_remark(cards)],
        cards_of(cards),
    )  # fmt: skip


def _measures(rows: Sequence[Mapping[str, Any]], metric: str) -> Iterator[Measure]:
    """One metric of all the rows that have it."""
    for row in rows:
        if (figure := row["metrics"].get(metric)) is None:
            continue
        sd, other = figure.get("sd"), figure.get("difference")
        yield Measure(
            str(row["name"]), str(row["kind"]), number(figure["value"]),
            None if sd is None else number(sd), int(figure["n"]), int(figure.get("repeats", 1)),
            None if other is None else difference_of(other),
        )  # fmt: skip


def _counts(measure: Measure) -> str:
    repeats = f" \N{MULTIPLICATION SIGN} {measure.repeats}" if measure.repeats > 1 else ""
    return f"{measure.n:,}{repeats}"


def _protocol_remark(cards: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Whether one protocol holds for all rows, or in what they differ."""
    if len(cards) < 2:
        return
    differing = [f.name for card in cards_of(cards) for f in card.fields if f.mark == "differs"]
    if differing:
        yield f"The rows differ in {', '.join(dict.fromkeys(differing))}: compare with care."
    elif all(card for _, card in cards):
        yield "All rows were drawn and measured under one protocol."
