"""A comparison for programs: CSV with one line per number, and a document for JSON.

Published figures are marked as such in both, and stand apart from what was measured here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from deme_cli.analysis.result import plain
from deme_cli.comparison.figures import cell_of, winner
from deme_cli.comparison.readings import readings
from deme_cli.comparison.results import Comparison, Published, Result, RowResult

_FIELDS = (
    "source", "row", "kind", "num_ranges", "seed", "measure", "metric", "repeat", "value",
    "updates", "images", "flops", "seconds", "search_evaluations", "search_images",
    "search_seconds", "error", "citation",
)  # fmt: skip


def csv_text(comparison: Comparison) -> str:
    """One line per row, training seed, column and repeat; failures and published figures after."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in comparison.rows:
        common = {
            "source": "measured", "row": row.name, "kind": row.kind, "num_ranges": row.num_ranges,
            "updates": row.updates, "images": row.images, "flops": row.flops,
        }  # fmt: skip
        writer.writerows({**common, **line} for line in _values(row.results))
        writer.writerows({**common, "error": " ".join(text.split())} for text in row.failures)
    if (published := comparison.published) is not None:
        common = {"source": "published", "kind": "published", "citation": published.source}
        for name, values in cited(comparison.rows, published):
            for metric, value in zip(published.columns, values, strict=True):
                if value is not None:
                    writer.writerow({**common, "row": name, "metric": metric, "value": value})
    return stream.getvalue()


def _values(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    for result in results:
        search = result.search
        common = {
            "seed": "" if result.seed is None else result.seed, "seconds": result.seconds,
            "search_evaluations": search.evaluations if search else "",
            "search_images": search.images if search else "",
            "search_seconds": search.seconds if search else "",
        }  # fmt: skip
        for column, values in result.values.items():
            place = {"measure": column.measure, "metric": column.metric}
            for repeat, value in enumerate(values):
                yield {**common, **place, "repeat": repeat, "value": value}


def document(comparison: Comparison) -> dict[str, Any]:
    """Everything, for JSON: what is not finite is null, published figures stand apart."""
    columns, published = comparison.columns, comparison.published
    return plain({
        "title": comparison.title,
        "columns": [{"title": column.title, **asdict(column)} for column in columns],
        "rows": [_row_document(row, comparison) for row in comparison.rows],
        "best": {
            column.title: {"row": won.best.name, "not_beaten": [r.name for r in won.not_beaten]}
            for column in columns
            if (won := winner(comparison.rows, column)) is not None
        },
        "reading": readings(comparison),
        "protocol": comparison.protocol,
        "cards": comparison.cards,
        "published": published and {
            **asdict(published), "rows": dict(cited(comparison.rows, published)),
        },
    })  # fmt: skip


def _row_document(row: RowResult, comparison: Comparison) -> dict[str, Any]:
    """A row: its costs, its values by column, seed and repeat, and the figures made of them."""
    known = asdict(replace(row, results=()))
    del known["published"]
    cells = {c.title: cell_of(row, c, comparison.rows[0]) for c in comparison.columns}
    return {
        **known,
        "results": [
            {
                "seed": result.seed,
                "values": {column.title: values for column, values in result.values.items()},
                "seconds": result.seconds,
                "search": result.search and asdict(result.search),
                "coefficients": result.coefficients,
            }
            for result in row.results
        ],
        "metrics": {title: asdict(cell) for title, cell in cells.items() if cell is not None},
    }


def cited(
    rows: Sequence[RowResult], published: Published
) -> Iterator[tuple[str, tuple[float | None, ...]]]:
    for row in rows:
        yield row.name, row.published or (None,) * len(published.columns)
