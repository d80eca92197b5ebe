"""A comparison as tables: in Markdown, on a terminal, as CSV with a line per number, as JSON.

What was measured here and what somebody printed never share a table: their model, data and budget
are other ones. Every figure comes from figures.py; here it is only written down.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from deme_cli.analysis.result import plain
from deme_cli.comparison.figures import (
    DAGGER,
    OVER_EVALUATION,
    Cell,
    Column,
    Comparison,
    Result,
    RowResult,
    cell_of,
    digits_of,
    flop_unit,
    headlines,
    search_of,
    seconds_of,
    state_of,
    status_of,
    winner,
)
from deme_cli.comparison.plan import Published

BLANK = "\N{EN DASH}"
TERMINAL_WIDTH, TERMINAL_GAP = 80, 2


def markdown(comparison: Comparison) -> str:
    """The report: measured table, what was compared, what may be said, published figures apart."""
    parts = [
        f"# {escape(comparison.title)}",
        _measured_table(comparison),
        *_bullets("What was compared", _compared(comparison)),
        *_bullets("Reading", headlines(comparison)),
        *_published_part(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """`text` on one line, with nothing that Markdown or a table cell would take for markup."""
    line = " ".join(text.split())
    line = re.sub(r"[\\`*|<$~&]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|^[#>+-]", r"\\\g<0>", line)
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", line)


def _measured_table(comparison: Comparison) -> str:
    """The last columns, search and state, are there where a row has something to say."""
    rows, (unit, scale) = comparison.rows, flop_unit(row.flops for row in comparison.rows)
    table: list[tuple[str, Sequence[str]]] = [("row", [escape(row.name) for row in rows])]
    for column in comparison.columns:
        arrow = "\N{DOWNWARDS ARROW}" if column.lower_is_better else "\N{UPWARDS ARROW}"
        names = f"{escape(column.title)} {arrow}", f"minus {escape(rows[0].name)} [95 % interval]"
        table += zip(names, zip(*_metric(column, rows), strict=True), strict=True)
    costs = zip(*(costs_of(row, scale) for row in rows), strict=True)
    table += zip(("updates", "images", unit, "seconds of training"), costs, strict=True)
    for name, texts in ("search", map(_search, rows)), ("state", map(status_of, rows)):
        if any(shown := [escape(text) for text in texts]):
            table.append((name, shown))
    header, parts = zip(*table, strict=True)
    return _grid(header, [*zip(*parts, strict=True)])


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of finished cells, numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    filled = [[cell or BLANK for cell in cells] for cells in (header, rule, *lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in filled)


def _metric(column: Column, rows: Sequence[RowResult]) -> Iterator[tuple[str, str]]:
    """Per row the mean, bold where it is best, and the difference to the first row."""
    cells, won = [cell_of(row, column, rows[0]) for row in rows], winner(rows, column)
    digits = digits_of(cells)
    for row, cell in zip(rows, cells, strict=True):
        shown = figure_text(cell, digits) if cell else ""
        is_best = won is not None and won.best is row and len(rows) > 1
        yield f"**{shown}**" if is_best else shown, difference_text(cell, digits)


def figure_text(cell: Cell, digits: int) -> str:
    """mean ± sd over training seeds, or with a dagger over evaluation seeds."""
    if cell.sd is not None:
        return f"{cell.mean:.{digits}f} ± {cell.sd:.{digits}f}"
    if cell.repeats_sd is not None:
        return f"{cell.mean:.{digits}f} ± {cell.repeats_sd:.{digits}f}{DAGGER}"
    return f"{cell.mean:.{digits}f}"


def difference_text(cell: Cell | None, digits: int, *, brief: bool = False) -> str:
    """The difference to the first row, with its interval or (brief) ± half of it; or empty."""
    if cell is None or (difference := cell.difference) is None:
        return ""
    mean, (low, high) = difference.mean, difference.interval
    mark = DAGGER if difference.over == OVER_EVALUATION else ""
    if brief:
        return f"{mean:+.{digits}f} ± {(high - low) / 2:.{digits}f}{mark}"
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{mark}"


def costs_of(row: RowResult, scale: float) -> list[str]:
    """Updates, images, FLOPs over `scale`, mean seconds of training; each empty for none."""
    seconds = seconds_of(row)
    return [
        f"{row.updates:,}" if row.updates else "",
        f"{row.images:,}" if row.images else "",
        _short(row.flops / scale) if row.flops else "",
        _short(seconds) if seconds else "",
    ]


def _short(value: float) -> str:
    """Three figures, and never a power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _search(row: RowResult) -> str:
    """What the search of coefficients took; empty if none."""
    cost = search_of(row)
    if cost is None:
        return ""
    return f"{cost.evaluations:,} candidates, {cost.images:,} images, {_short(cost.seconds)} s"


def _compared(comparison: Comparison) -> Iterator[str]:
    """Rows, seeds, what the marks mean, and the protocol."""
    for row in comparison.rows:
        ranges = f" of {row.num_ranges} ranges" if row.kind in ("ensemble", "merged") else ""
        settings = "".join(f", {name} = {value}" for name, value in row.settings.items())
        found = "; ".join(
            ", ".join(f"{one:g}" for one in result.coefficients)
            for result in row.results
            if result.coefficients
        )
        chosen = f"; coefficients by training seed: {found}" if found else ""
        yield f"{row.name}: {row.kind}{ranges}{settings}{chosen}"
    results = [result for row in comparison.rows for result in row.results]
    seeds = {result.seed for result in results} - {None}
    repeats = max((len(values) for one in results for values in one.values.values()), default=0)
    yield f"training seeds: {len(seeds)}; evaluation seeds of each: {repeats}"
    yield (
        f"± is the sd over training seeds; differences are paired by training and evaluation seed; "
        f"in brackets the 95 % interval of their mean (Student's t), uncorrected for the number of "
        f"rows; {DAGGER} over evaluation seeds only, which tell nothing of how training varies"
    )
    yield (
        "costs are of training in total, all ranges together; seconds are a mean over seeds, of "
        "jobs that may have run side by side or on several machines"
    )
    yield from comparison.protocol


def _bullets(heading: str, lines: Iterable[str]) -> Iterator[str]:
    if shown := "\n".join(f"- {escape(line)}" for line in lines):
        yield f"## {heading}\n\n{shown}"


def _published_part(comparison: Comparison) -> Iterator[str]:
    if (published := comparison.published) is not None:
        whose = f"{escape(published.source)}; not measured here: their model, data and budget"
        yield f"## Published ({whose})"
        yield _grid(
            ["row", *map(escape, published.columns)],
            [
                [escape(name), *("" if value is None else f"{value:g}" for value in values)]
                for name, values in cited(comparison.rows, published)
            ],
        )


def terminal_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for `console.table`; names are wrapped so that one metric fits 80 columns.

    Differences to the first row are left out where several metrics share the width.
    """
    rows, (unit, scale) = comparison.rows, flop_unit(row.flops for row in comparison.rows)
    table: list[tuple[str, Sequence[str]]] = []
    for column in comparison.columns:
        cells = [cell_of(row, column, rows[0]) for row in rows]
        digits, title = digits_of(cells), f"{textwrap.fill(column.title, 14)}\n± sd"
        table.append((title, [figure_text(cell, digits) if cell else "" for cell in cells]))
        if len(comparison.columns) == 1:
            minus = [difference_text(cell, digits, brief=True) for cell in cells]
            table.append(("minus first\n± 95 %", minus))
    updates, _, flops, _ = zip(*(costs_of(row, scale) for row in rows), strict=True)
    times = [_time(seconds_of(row)) for row in rows]
    table += [("updates", updates), (unit, flops), ("time", times)]
    taken = sum(max(map(len, "\n".join([name, *part]).split("\n"))) for name, part in table)
    room = max(TERMINAL_WIDTH - taken - TERMINAL_GAP * (len(table) + 1), 12)
    names = [textwrap.fill(f"{row.name} {state_of(row)}", room) for row in rows]
    header, parts = zip(*table, strict=True)
    return ["row", *header], [list(line) for line in zip(names, *parts, strict=True)]


def _time(seconds: float) -> str:
    """Seconds, minutes or hours, in three figures; empty for none."""
    unit, size = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if seconds >= s), ("s", 1))
    return f"{seconds / size:.3g} {unit}" if seconds else ""


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
        "reading": headlines(comparison),
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
