"""From what was measured to the figures of the table, and to what may be said from them.

S training seeds, R repeats of the evaluation. A result is averaged over its repeats first, and
training seeds are the sample: how much a method owes to chance is their spread. Two rows are
compared by the differences of equal training seeds, each taken within the repeats, so that noise
which both rows share is gone. An interval holds for the evaluation seeds of the table; it is not
corrected for how many rows are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deme_cli.comparison.plan import Published
from deme_cli.evaluation.measure import Difference, interval_of

DAGGER = "\N{DAGGER}"  # marks a spread over evaluation seeds, where one training seed has none
OVER_TRAINING, OVER_EVALUATION = "training seeds", "evaluation seeds"
_HIGHER_IS_BETTER = ("clip_score", "accuracy")
_UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))


def lower_is_better(metric: str) -> bool:
    """Of a metric as `deme eval` names it."""
    return metric not in _HIGHER_IS_BETTER


def flop_unit(flops: Iterable[float]) -> tuple[str, float]:
    """One unit for all of them, with its FLOPs: the largest that the costliest has one of."""
    most = max(flops, default=0.0)
    return next((unit for unit in _UNITS if most >= unit[1]), _UNITS[-1])


@dataclass(frozen=True)
class Column:
    """One figure of the table: `metric` as `deme eval` names it, under the measure of that name."""

    metric: str
    measure: str = ""  # empty where a plan has one measure
    lower_is_better: bool = True

    @property
    def title(self) -> str:
        return f"{self.measure} {self.metric}".strip()


@dataclass(frozen=True)
class SearchCost:
    """What the search of a merge's coefficients took, besides training."""

    evaluations: int
    images: int
    seconds: float
    objective: str = ""


@dataclass(frozen=True)
class Result:
    """One training seed of a row (None for a row without training).

    values: per column, one number per repeat. `seconds` of training, all ranges together.
    `coefficients` are those of a merged model.
    """

    seed: int | None
    values: dict[Column, tuple[float, ...]]
    seconds: float = 0.0
    search: SearchCost | None = None
    coefficients: tuple[float, ...] = ()


@dataclass(frozen=True)
class RowResult:
    """A row as far as it is: its results, and why some are missing.

    updates, images, flops: of training in total, all ranges together; the same for every seed.
    `published` has one number (or None) per published column. `pending` counts the seeds that have
    neither a result nor a failure.
    """

    name: str
    kind: str  # base, finetune, ensemble or merged
    num_ranges: int
    settings: dict[str, Any]  # what sets the row apart from plain finetuning
    results: tuple[Result, ...]
    updates: int = 0
    images: int = 0
    flops: float = 0.0
    published: tuple[float | None, ...] = ()
    failures: tuple[str, ...] = ()
    pending: int = 0


@dataclass(frozen=True)
class Comparison:
    """The whole table. The first row is what the others are compared with."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[RowResult, ...]
    protocol: tuple[str, ...]  # lines that say what the figures depend on
    published: Published | None = None
    cards: dict[str, Any] = field(default_factory=dict)  # protocol cards by measure, for JSON


LONGEST_REASON = 200  # characters of a failure in a table; CSV and JSON have the whole


@dataclass(frozen=True)
class RowDifference(Difference):
    """A row minus another. `over` says what sd and interval are over: training seeds, or the
    evaluation seeds where the rows share one training seed, or neither row trains."""

    over: str = OVER_TRAINING


@dataclass(frozen=True)
class Cell:
    """One column of one row.

    seed_means: one mean over R repeats per training seed (one for a row without training).
    sd, interval: of these means and of their mean (95 %, Student's t); None for fewer than two.
    repeats_sd: the sd over repeats, averaged over training seeds; None for R = 1.
    """

    mean: float
    seed_means: tuple[float, ...]
    sd: float | None
    interval: tuple[float, float] | None
    repeats_sd: float | None
    num_repeats: int
    difference: RowDifference | None = None

    @property
    def num_seeds(self) -> int:
        return len(self.seed_means)


@dataclass(frozen=True)
class Winner:
    """The best row of a column, and the rows that it does not beat (see `beats`)."""

    best: RowResult
    not_beaten: tuple[RowResult, ...]


def cell_of(row: RowResult, column: Column, first: RowResult) -> Cell | None:
    """The figures of a row, and its difference to `first`; None where it has no result."""
    results = list(_by_seed(row, column).values())
    if not results:
        return None
    means = [float(values.mean()) for values in results]
    spreads = [float(values.std(ddof=1)) for values in results if len(values) > 1]
    return Cell(
        mean=float(np.mean(means)),
        seed_means=tuple(means),
        sd=float(np.std(means, ddof=1)) if len(means) > 1 else None,
        interval=interval_of(means) if len(means) > 1 else None,
        repeats_sd=float(np.mean(spreads)) if spreads else None,
        num_repeats=min(len(values) for values in results),
        difference=None if row is first else difference_of(row, first, column),
    )


def difference_of(row: RowResult, other: RowResult, column: Column) -> RowDifference | None:
    """`row` minus `other`, paired; None where fewer than two pairs leave no interval."""
    pairs = list(_pairs(_by_seed(row, column), _by_seed(other, column)))
    if not pairs:
        return None
    is_over_training = len(pairs) > 1
    sample = [float(pair.mean()) for pair in pairs] if is_over_training else pairs[0].tolist()
    if len(sample) < 2:
        return None
    return RowDifference(
        to=other.name,
        mean=float(np.mean(sample)),
        sd=float(np.std(sample, ddof=1)),
        interval=interval_of(sample),
        over=OVER_TRAINING if is_over_training else OVER_EVALUATION,
    )


def _by_seed(row: RowResult, column: Column) -> dict[int | None, np.ndarray]:
    """The values over repeats by training seed (None for a row without training)."""
    return {
        result.seed: np.array(result.values[column], dtype=np.float64)
        for result in row.results
        if result.values.get(column)
    }


def _pairs(
    ours: dict[int | None, np.ndarray], theirs: dict[int | None, np.ndarray]
) -> Iterator[np.ndarray]:
    """Ours minus theirs in the shared repeats, for each shared training seed.

    A row without training stands beside every training seed of the other.
    """
    if None in theirs:
        both = [(values, theirs[None]) for values in ours.values()]
    elif None in ours:
        both = [(ours[None], values) for values in theirs.values()]
    else:
        both = [(values, theirs[seed]) for seed, values in ours.items() if seed in theirs]
    for one, other in both:
        shared = min(len(one), len(other))
        with np.errstate(invalid="ignore"):  # inf - inf is no difference
            difference = one[:shared] - other[:shared]
        yield difference


def beats(row: RowResult, other: RowResult, column: Column) -> bool:
    """Whether the interval of the paired difference lies wholly on the better side of 0."""
    difference = difference_of(row, other, column)
    if difference is None:
        return False
    low, high = difference.interval
    return high < 0 if column.lower_is_better else low > 0


def winner(rows: Sequence[RowResult], column: Column) -> Winner | None:
    """The best finite mean among the rows that have all their seeds, or else among all rows."""
    means = {row.name: cell.mean for row in rows if (cell := cell_of(row, column, row))}
    measured = [row for row in rows if np.isfinite(means.get(row.name, np.nan))]
    whole = [row for row in measured if not is_partial(row)] or measured
    if not whole:
        return None
    sign = 1 if column.lower_is_better else -1
    best = min(whole, key=lambda row: sign * means[row.name])
    others = [row for row in measured if row is not best]
    return Winner(best, tuple(row for row in others if not beats(best, row, column)))


def is_partial(row: RowResult) -> bool:
    """Whether some of its seeds failed or have not run yet."""
    return bool(row.failures or row.pending)


def seconds_of(row: RowResult) -> float:
    """Seconds of training, a mean over training seeds; 0 without a result."""
    return sum(result.seconds for result in row.results) / max(len(row.results), 1)


def search_of(row: RowResult) -> SearchCost | None:
    """What the search of coefficients took, a mean over training seeds; None without a search."""
    costs = [result.search for result in row.results if result.search is not None]
    if not costs:
        return None
    return SearchCost(
        evaluations=round(np.mean([cost.evaluations for cost in costs])),
        images=round(np.mean([cost.images for cost in costs])),
        seconds=float(np.mean([cost.seconds for cost in costs])),
        objective=costs[0].objective,
    )


def state_of(row: RowResult) -> str:
    """A word on what is missing of a row, in brackets; empty where nothing is."""
    if not is_partial(row):
        return ""
    return "(partial)" if row.results else "(failed)" if row.failures else "(not run yet)"


def status_of(row: RowResult) -> str:
    """What is missing of a row and why; empty where nothing is."""
    total = len(row.results) + len(row.failures) + row.pending
    parts = []
    if row.failures:
        reasons = "; ".join(dict.fromkeys(" ".join(reason.split()) for reason in row.failures))
        cut = reasons if len(reasons) <= LONGEST_REASON else f"{reasons[:LONGEST_REASON]} ..."
        parts.append(f"failed{' for other seeds' if row.results else ''}: {cut}")
    if row.pending:
        parts.append("not run yet" + (f" ({row.pending} of {total} seeds)" * (total > 1)))
    return "; ".join(parts)


def digits_of(cells: Sequence[Cell | None]) -> int:
    """Digits after the point for a whole column: two figures of its typical spread."""
    found = [cell for cell in cells if cell is not None]
    spreads = sorted(spread for cell in found if (spread := cell.sd or cell.repeats_sd))
    largest = max((abs(cell.mean) for cell in found), default=0.0)
    scale = spreads[len(spreads) // 2] if spreads else largest / 100
    return int(np.clip(1 - np.floor(np.log10(scale)), 0, 6)) if 0 < scale < np.inf else 3


def headlines(comparison: Comparison) -> list[str]:
    """The best row of each column and those not told apart from it, and what is still missing."""
    rows = [row for row in comparison.rows if row.results]
    lines = [line for column in comparison.columns if (line := best_line(rows, column))]
    if names := ", ".join(row.name for row in rows if is_partial(row)):
        lines.append(f"not all seeds are measured yet: {names}")
    return lines


def best_line(rows: Sequence[RowResult], column: Column) -> str:
    """Which row is best, and which are not told apart from it."""
    found = winner(rows, column)
    if found is None or len(rows) < 2:
        return ""
    if found.not_beaten:
        names = ", ".join(row.name for row in found.not_beaten)
        return f"{column.title}: best is {found.best.name}; not told apart from it: {names}"
    return f"{column.title}: best is {found.best.name}, told apart from every other row"
