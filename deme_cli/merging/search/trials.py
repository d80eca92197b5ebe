"""What a search has found so far: one trial per evaluation, and which of them is best. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deme_cli.errors import NumericsError
from deme_cli.merging.search.space import Point

BASE_NAME, MEAN_NAME, SOUP_NAME = "base", "1/N each", "soup candidate"
BY_RANGE = "by_range"  # in `extra`: the loss on the range of each expert


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluation: a point of the space and its objective (inf where it was not finite).

    `best` is the least objective of its rung so far, this one included; `rung` counts the ladder's
    objectives from 0; `name` tells what a reference point is (base, 1/N each, soup candidate).
    """

    index: int
    point: Point
    objective: float
    best: float
    rung: int = 0
    seconds: float = 0.0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """A trial as the journal has it: running (value None), or done (inf where it was not finite).

    `began` and `ended` are seconds since the epoch; `extra` is what else was measured (slopes).
    """

    number: int
    rung: int
    point: Point
    value: float | None
    name: str = ""
    began: float = 0.0
    ended: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


def known_values(asked: Sequence[Asked]) -> dict[Point, float | None]:
    """The value of each point; None where it is being evaluated."""
    return {trial.point: trial.value for trial in asked}


def trials_of(asked: Sequence[Asked]) -> list[Trial]:
    """The finished ones, with the running best of each rung."""
    best: dict[int, float] = {}
    trials = []
    for one in asked:
        if one.value is not None:
            best[one.rung] = min(best.get(one.rung, math.inf), one.value)
            seconds = max(one.ended - one.began, 0.0)
            trials.append(
                Trial(one.number, one.point, one.value, best[one.rung], one.rung, seconds, one.name)
            )
    return trials


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """From best to worst: by objective, then by the norm of the point, then by number.

    Raises NumericsError where no objective is finite.
    """
    if not any(math.isfinite(trial.objective) for trial in trials):
        raise NumericsError(
            "the objective is not finite for any candidate; look for NaN in the experts, "
            "or use --dtype fp32"
        )
    return sorted(trials, key=lambda t: (t.objective, math.hypot(*t.point), t.index))


def seconds_spent(asked: Sequence[Asked]) -> float:
    """Time in which at least one finished trial was under way, whoever ran it."""
    total, until = 0.0, -math.inf
    for one in sorted((a for a in asked if a.value is not None), key=lambda a: a.began):
        total += max(one.ended - max(one.began, until), 0.0)
        until = max(until, one.ended)
    return total
