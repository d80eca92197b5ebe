"""Plans whose points are known beforehand: every point of a grid, or points drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deme_cli.merging.search.plan import Plan
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import Asked, known_values

PER_NUMBER = 25


class FixedPoints(Plan):
    """Points one after another, in order."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = list(points)
        self.evaluations = len(self.points)

    def propose(self, trials: Sequence[Asked]) -> Point | None:
        known = known_values(trials)
        return next((point for point in self.points if point not in known), None)


def random_points(space: Space, num: int | None, seed: int) -> list[Point]:
    """The start, then points drawn uniformly within the bounds (Bergstra & Bengio 2012).

    num: of points, by default 25 per searched number.
    """
    num = num or PER_NUMBER * space.dimensions
    low, high = np.array(space.box).T
    drawn = np.random.default_rng(seed).uniform(low, high, (max(num - 1, 0), space.dimensions))
    return [space.start_point, *(tuple(map(float, point)) for point in drawn)]
