"""The greedy soup (Wortsman et al. 2022, recipe 1), with task vectors for ingredients.

Experts are tried alone and sorted; each is added to the mean of those already chosen if that lowers
the objective, or does not raise it. The mean of the chosen is sum of tau_i / (how many).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from deme_cli.merging.search.plan import Plan, Wait, needed
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import Asked, known_values


class GreedySoup(Plan):
    """At most 2 N - 1 trials."""

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
        values = {point: value for point, value in known.items() if value is not None}
        alone = [self.mean_of([i]) for i in range(self.space.num_experts)]
        if (step := needed(alone, known)) is not None:
            return step
        order = sorted(range(len(alone)), key=lambda i: (values[alone[i]], i))
        chosen, least = [order[0]], values[alone[order[0]]]
        for expert in order[1:]:
            point = self.mean_of([*chosen, expert])
            if (step := needed([point], known)) is not None:
                return step
            if math.isfinite(values[point]) and values[point] <= least:
                chosen, least = [*chosen, expert], values[point]
        return chosen
