"""The table that `deme compare` left in `compare.json`: what it measured, what it may say of it,
and, apart from that, the published figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deme_cli.comparison.results import DAGGER, OVER_EVALUATION, flop_unit
from deme_cli.console import number, plain
from deme_cli.reporting.measures import Measure
from deme_cli.reporting.tables import (
    Cell,
    Results,
    Table,
    add_columns,
    cards_of,
    difference_of,
    metric_cells,
    metric_columns,
    plain_table,
    public_name,
)

_NOTE = (
    "± is the standard deviation over training seeds; differences are paired by training and "
    "evaluation seed, in brackets the 95 % interval of their mean (Student's t), uncorrected for "
    f"the number of rows. {DAGGER}: over evaluation seeds only, which tell nothing of how training "
    "varies."
)


def is_comparison(document: Mapping[str, Any]) -> bool:
    """Whether a JSON document is one of `deme compare`."""
    return all(name in document for name in ("title", "columns", "rows", "reading"))


def comparison(name: str, document: Mapping[str, Any]) -> Results:
    """What a comparison says. Raises LookupError, TypeError or ValueError on another shape."""
    rows = document["rows"]
    columns, cells = ["row"], [[Cell(str(row["name"]), note=_state(row))] for row in rows]
    for column in document["columns"]:
        title, metric = str(column["title"]), str(column["metric"])
        measures = list(_measures(rows, title))
        if not measures:
            continue
        headings = metric_columns(title, metric, measures)
        marked = _marked(metric_cells(metric, measures), rows, title)
        add_columns(columns, cells, headings, marked)
    for heading, *texts in zip(*_costs(rows), strict=True):
        columns.append(heading)
        for line, text in zip(cells, texts, strict=True):
            line.append(Cell(text))
    cards = [(str(measure) or "every row", card) for measure, card in document["cards"].items()]
    return Results(
        name, str(document["title"]), [f"{line}." for line in document["reading"]],
        Table(f"Measured rows of {name}", columns, cells),
        [_NOTE, *(str(line) for line in document["protocol"])], cards_of(cards),
        list(_published(document.get("published"))),
    )  # fmt: skip


def _state(row: Mapping[str, Any]) -> str:
    """Its kind, and what is missing of it."""
    parts = [str(row["kind"])]
    if failures := row.get("failures"):
        words = map(public_name, str(failures[0]).split())
        parts.append(f"failed: {' '.join(words)[:200]}")
    if pending := row.get("pending"):
        parts.append(f"{pending} seeds not run yet")
    return "; ".join(parts)


def _measures(rows: Sequence[Mapping[str, Any]], title: str) -> Iterator[Measure]:
    for row in rows:
        if (cell := row["metrics"].get(title)) is None:
            continue
        sd = cell["sd"] if cell["sd"] is not None else cell["repeats_sd"]
        other = cell.get("difference")
        yield Measure(
            str(row["name"]), str(row["kind"]), number(cell["mean"]),
            None if sd is None else number(sd), 0, int(cell["num_repeats"]),
            None if other is None else difference_of(other),
        )  # fmt: skip


def _marked(
    lines: Mapping[str, list[Cell]], rows: Sequence[Mapping[str, Any]], title: str
) -> dict[str, list[Cell]]:
    """A dagger where a spread or an interval is over evaluation seeds only."""
    found = dict(lines)
    for row in rows:
        name = str(row["name"])
        if name not in found:
            continue
        cell, line = row["metrics"][title], list(found[name])
        if cell["sd"] is None and cell["repeats_sd"] is not None:
            line[0] = replace(line[0], text=line[0].text + DAGGER)
        if (other := cell.get("difference")) and other.get("over") == OVER_EVALUATION:
            line[1] = replace(line[1], text=line[1].text + DAGGER)
        found[name] = line
    return found


def _costs(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Training seeds, updates, FLOPs and seconds of training: headings, then a line per row."""
    flops = [number(row["flops"]) for row in rows]
    unit, scale = flop_unit(flops)
    yield "training seeds", "updates", unit, "seconds of training"
    for row, cost in zip(rows, flops, strict=True):
        trained = [one for one in row["results"] if one["seed"] is not None]
        seconds = [number(one["seconds"]) for one in trained]
        yield (
            str(len(trained) or ""),
            f"{int(row['updates']):,}" if row["updates"] else "",
            plain(float(f"{cost / scale:.3g}")) if cost else "",
            plain(float(f"{sum(seconds) / len(seconds):.3g}")) if any(seconds) else "",
        )


def _published(published: Mapping[str, Any] | None) -> Iterator[Table]:
    if not published:
        return
    columns = [str(column) for column in published["columns"]]
    yield plain_table(
        f"Published: {published['source']}; not measured here, of another model, data and budget",
        ["row", *columns],
        [
            [str(name), *("" if value is None else plain(number(value)) for value in values)]
            for name, values in published["rows"].items()
        ],
    )
