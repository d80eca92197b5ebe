"""The greedy soup (Wortsman et al. 2022, recipe 1), with task vectors for ingredients.

Experts are tried alone and sorted; each is added to the mean of those already chosen if that lowers
the objective, or does not raise it. The mean of the chosen is sum of tau_i / (how many).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from deme_cli.merging.search.plan import WAIT, Wait
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import Asked, known_values


class GreedySoup:
    """At most 2 N - 1 trials."""

    needs_slopes = False

    def __init__(self, space: Space) -> None:
        self.space = space
        self.evaluations = 2 * space.num_experts - 1

    def mean_of(self, chosen: Sequence[int]) -> Point:
        """The mean of some experts' task vectors, for every group."""
        share = [1 / len(chosen) if i in chosen else 0.0 for i in range(self.space.num_experts)]
        return self.space.everywhere(share)

    def propose(self, trials: Sequence[Asked]) -> Point | Wait | None:
        step = self._walk(trials)
        return None if isinstance(step, list) else step

    def soup(self, trials: Sequence[Asked]) -> Point | None:
        """The mean of the chosen, once all its trials are done."""
        step = self._walk(trials)
        return self.mean_of(step) if isinstance(step, list) else None

    def _walk(self, trials: Sequence[Asked]) -> Point | Wait | list[int]:
        """The point that is needed next, or the experts chosen."""
        known = known_values(trials)
        alone = [self.mean_of([i]) for i in range(self.space.num_experts)]
        if (step := _need(alone, known)) is not None:
            return step
        order = sorted(range(len(alone)), key=lambda i: (known[alone[i]], i))
        chosen, least = [order[0]], known[alone[order[0]]]
        for expert in order[1:]:
            point = self.mean_of([*chosen, expert])
            if (step := _need([point], known)) is not None:
                return step
            value = known[point]
            assert value is not None
            assert least is not None
            if math.isfinite(value) and value <= least:
                chosen, least = [*chosen, expert], value
        return chosen

    def remarks(self, trials: Sequence[Asked]) -> list[str]:
        return []


def _need(points: Sequence[Point], known: dict[Point, float | None]) -> Point | Wait | None:
    """The first point without a value, or WAIT where somebody has it."""
    for point in points:
        if point not in known:
            return point
    return WAIT if any(known[point] is None for point in points) else None
