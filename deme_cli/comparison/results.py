"""What a comparison has measured so far: per row, per training seed, per seed of the evaluation.

S training seeds, R repeats of the evaluation. Rows of one repeat share their starting noise, so
what two rows differ by is taken within each repeat. No torch, no numpy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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
class Published:
    """Figures that somebody printed: of their model, data and budget, never measured here."""

    source: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The whole table. The first row is what the others are compared with."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[RowResult, ...]
    protocol: tuple[str, ...]  # lines that say what the figures depend on
    published: Published | None = None
    cards: dict[str, Any] = field(default_factory=dict)  # protocol cards by measure, for JSON
