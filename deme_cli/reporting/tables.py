"""What the page shows of measured rows: tables, their cells, and the protocol cards below them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from deme_cli.comparison.results import OVER_EVALUATION, lower_is_better
from deme_cli.console import number
from deme_cli.evaluation.comparable import WHO_AND_WHENCE
from deme_cli.reporting.measures import (
    BETTER,
    EVEN,
    WORSE,
    Difference,
    Measure,
    best_of,
)

_MOST_ENTRIES = 64  # of a list of tables in a card; a longer one is shown as JSON
_WORDS = {BETTER: "better", WORSE: "worse", EVEN: "not told apart"}


@dataclass(frozen=True)
class Whisker:
    """An interval drawn beside its numbers: places of 0, both ends and the mean, from 0 to 100."""

    zero: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class Cell:
    """`tone` is better, worse, even or differs; `whisker` stands in place of a text."""

    text: str = ""
    tone: str = ""
    strong: bool = False
    whisker: Whisker | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """The first column names the rows, the others are numbers unless they are in `words`."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Field:
    """A line of a protocol card. mark: `differs`, `by row` (as it should), or nothing."""

    name: str
    text: str
    mark: str = ""


@dataclass(frozen=True)
class Card:
    title: str
    fields: Sequence[Field]


@dataclass(frozen=True)
class Results:
    """A table with what is said of it above and below, and the cards of its rows."""

    name: str
    title: str
    verdicts: list[str]
    table: Table
    remarks: list[str]
    cards: list[Card]
    more: list[Table] = field(default_factory=list)


def difference_of(entry: Mapping[str, Any]) -> Difference:
    """The paired difference that a document holds."""
    low, high = map(number, entry["interval"])
    over = str(entry.get("over", OVER_EVALUATION))
    return Difference(str(entry["to"]), number(entry["mean"]), number(entry["sd"]), low, high, over)


def add_columns(
    columns: list[str], lines: Sequence[list[Cell]], headings: Sequence[str],
    cells: Mapping[str, Sequence[Cell]],
) -> None:  # fmt: skip
    """Add a metric to a table whose lines begin with the names of rows; blanks where it is none."""
    columns += headings
    for line in lines:
        line += cells.get(line[0].text, [Cell()] * len(headings))


def metric_columns(title: str, metric: str, measures: Sequence[Measure]) -> list[str]:
    """The headings of a metric: its value and, where there are any, the differences."""
    arrow = "\N{DOWNWARDS ARROW}" if lower_is_better(metric) else "\N{UPWARDS ARROW}"
    to = next((m.difference.to for m in measures if m.difference), None)
    return [f"{title} {arrow}", *([] if to is None else [f"minus {to}", "95 % interval"])]


def metric_cells(metric: str, measures: Sequence[Measure]) -> dict[str, list[Cell]]:
    """The cells of a metric by row: value, and where rows are paired the difference, drawn too."""
    lower = lower_is_better(metric)
    best = best_of(measures, lower=lower)
    known = [m.difference for m in measures if m.difference and m.difference.is_known]
    is_paired = any(m.difference for m in measures)
    cells = {}
    for measure in measures:
        line = [Cell(measure.text, strong=measure is best and len(measures) > 1)]
        if difference := measure.difference:
            side = difference.side(lower)
            line += [
                Cell(difference.text, tone=side, note=_WORDS[side]),
                Cell(whisker=_whisker(difference, known), tone=side),
            ]
        elif is_paired:
            line += [Cell(), Cell()]
        cells[measure.row] = line
    return cells


def _whisker(difference: Difference, known: Sequence[Difference]) -> Whisker | None:
    """All differences of a column on one scale, with 0 in it."""
    if not difference.is_known:
        return None
    low = min(0.0, *(one.low for one in known))
    high = max(0.0, *(one.high for one in known))
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(3 + 94 * (value - low) / span, 2)

    return Whisker(place(0.0), place(difference.low), place(difference.mean),
                   place(difference.high))  # fmt: skip


def cards_of(cards: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Card]:
    """A card per row, its fields marked where rows differ."""
    flat = [(title, dict(flatten(card))) for title, card in cards]
    names = dict.fromkeys(name for _, fields in flat for name in fields)
    values = {name: {fields.get(name) for _, fields in flat} for name in names}

    def mark(name: str) -> str:
        if len(values[name]) == 1:
            return ""
        return "by row" if name.split(".")[0] in WHO_AND_WHENCE else "differs"

    return [
        Card(title, [Field(name, fields.get(name, "absent"), mark(name)) for name in names])
        for title, fields in flat
        if fields
    ]


def flatten(card: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Fields of a card as texts, those of tables in it under `table.field`, or `table.1.field`."""
    for name, value in card.items():
        is_list = isinstance(value, list) and len(value) <= _MOST_ENTRIES
        if is_list and all(isinstance(entry, Mapping) for entry in value):
            value = dict(enumerate(value, start=1)) or value
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", as_text(value)


def as_text(value: Any, *, longest: int = 2000) -> str:
    """A value of a record as a person reads it; of a very long one the beginning."""
    if isinstance(value, str):
        text = public_name(value)
    elif value is None or isinstance(value, bool):
        text = {None: "none", True: "yes", False: "no"}[value]
    elif isinstance(value, float):
        text = f"{value:.6g}" if math.isfinite(value) else "not finite"
    elif isinstance(value, (list, tuple)) and not any(isinstance(v, (list, dict)) for v in value):
        text = ", ".join(as_text(entry) for entry in value) or "none"
    else:
        text = json.dumps(value, ensure_ascii=False)
    cut = len(text) - longest
    return text if cut <= 0 else f"{text[:longest]} … ({cut:,} more characters)"


def public_name(text: str) -> str:
    """Of an absolute path the last part, for a page is shared; anything else as it is."""
    scheme = "local-dir:" if text.startswith("local-dir:") else ""  # of CLIP's weights
    place = text.removeprefix(scheme)
    is_absolute = any(kind(place).is_absolute() for kind in (PurePosixPath, PureWindowsPath))
    if not (is_absolute or place.startswith("~")):
        return text
    return scheme + (PureWindowsPath(place).name or place)  # which knows both separators


def plain_table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    words: Iterable[int] = (),
) -> Table:
    """A table of texts alone."""
    cells = [[Cell(text) for text in row] for row in rows]
    return Table(caption, columns, cells, frozenset(words))
