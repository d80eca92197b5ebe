"""CMA-ES (Hansen 2016, arXiv:1604.00772), by the package `cmaes`: generation after generation.

The box is scaled to the unit cube. A candidate that is broken counts as the worst of its
generation. The generations are drawn from the seed alone, so any process can draw them again; what
was drawn is remembered for as long as the trials agree with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from deme_cli.merging.search.plan import Known, Plan, Wait, needed
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import Asked, known_values

if TYPE_CHECKING:
    from cmaes import CMA

FIRST_STEP = 0.25  # initial deviation as a share of the box (Hansen 2016, section B.1: 0.2-0.5)
PER_NUMBER, MOST = 30, 1000  # evaluations by default
_WIDE = 50  # dimensions from which hardly any draw lies within the box
_REDRAWS, _WIDE_REDRAWS = 100, 5  # of a draw outside the box, before it is clipped


class Evolution(Plan):
    """One generation after another, each asked for as a whole before the next is drawn."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        self.evaluations = min(PER_NUMBER * space.dimensions, MOST)
        self._low, high = np.array(space.box).T
        self._width = high - self._low
        self._restart()

    def _restart(self) -> None:
        self._strategy = self._first()
        self._told: dict[Point, float | None] = {}
        self._drawn = self._draw()

    def _first(self) -> CMA:
        from cmaes import CMA

        count = self.space.dimensions
        return CMA(
            mean=(np.array(self.space.start_point) - self._low) / self._width,
            sigma=FIRST_STEP,
            bounds=np.tile([0.0, 1.0], (count, 1)),
            n_max_resampling=_WIDE_REDRAWS if count > _WIDE else _REDRAWS,
            seed=self.seed % 2**32,
        )

    def _draw(self) -> list[np.ndarray]:
        return [self._strategy.ask() for _ in range(self._strategy.population_size)]

    def propose(self, trials: Sequence[Asked]) -> Point | Wait | None:
        known = known_values(trials)
        if any(known.get(point) != value for point, value in self._told.items()):
            self._restart()
        while not self._strategy.should_stop():
            points = [tuple(map(float, self._low + x * self._width)) for x in self._drawn]
            if (step := needed(points, known)) is not None:
                return step
            self._tell(points, known)
        return None

    def _tell(self, points: Sequence[Point], known: Known) -> None:
        values = _finite([known[point] for point in points])
        self._strategy.tell(list(zip(self._drawn, values, strict=True)))
        self._told.update({point: known[point] for point in points})
        self._drawn = self._draw()


def _finite(values: Sequence[float | None]) -> list[float]:
    """Objectives with the worst finite one, and a little, in place of the broken ones."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    worst = max(finite, default=0.0)
    return [v if v is not None and math.isfinite(v) else worst + abs(worst) + 1 for v in values]
