"""What a search has found so far: one trial per evaluation, and which of them is best. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deme_cli.errors import NumericsError
from deme_cli.merging.search.space import Point

BASE_NAME, MEAN_NAME, SOUP_NAME = "base", "1/N each", "soup candidate"
REFERENCES = (BASE_NAME, MEAN_NAME)
BY_RANGE, SLOPES = "by_range", "slopes"  # in `extra`: the loss on each expert's range; gradient


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluation: a point of the space and its objective, None while it is being evaluated and
    infinite where it was not finite.

    `rung` counts the objectives of a ladder from 0; `name` tells what a reference point is; `began`
    and `ended` are seconds since the epoch; `extra` is what else was measured.
    """

    index: int
    rung: int
    point: Point
    objective: float | None
    name: str = ""
    began: float = 0.0
    ended: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.objective is not None

    @property
    def value(self) -> float:
        """The objective, infinite where there is none (yet)."""
        return math.inf if self.objective is None else self.objective

    @property
    def seconds(self) -> float:
        return max(self.ended - self.began, 0.0)


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """From best to worst: by objective, then by the norm of the point, then by number.

    Raises NumericsError where no objective is finite.
    """
    if not any(math.isfinite(trial.value) for trial in trials):
        raise NumericsError(
            "the objective is not finite for any candidate; look for NaN in the experts, "
            "or use --dtype fp32"
        )
    return sorted(trials, key=lambda t: (t.value, math.hypot(*t.point), t.index))


def seconds_spent(trials: Sequence[Trial]) -> float:
    """Time in which at least one finished trial was under way, whoever ran it."""
    total, until = 0.0, -math.inf
    for trial in sorted((t for t in trials if t.is_done), key=lambda t: t.began):
        total += max(trial.ended - max(trial.began, until), 0.0)
        until = max(until, trial.ended)
    return total
