"""Coarse to fine: one coefficient per expert first, then one per group, starting from the best.

So what is found for blocks or layers is never worse, on the objective that was searched, than what
the first stage found for whole networks; a number of evaluations that was given is shared between
the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from deme_cli.merging.search.plan import Plan, Wait
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import Asked

COARSE_SHARE = 1 / 3  # of the evaluations, where their number was given


class CoarseToFine(Plan):
    """`open_plan` opens the plan of a space; `evaluations`: the number given, if any."""

    def __init__(
        self, space: Space, open_plan: Callable[[Space, int | None], Plan], evaluations: int | None
    ) -> None:
        self.space, self._open_plan = space, open_plan
        part = max(round(evaluations * COARSE_SHARE), 1) if evaluations else None
        self.coarse = open_plan(replace(space, groups=(), has_rest=True, shares=(1.0,)), part)
        self._most_coarse = min(self.coarse.evaluations, part or self.coarse.evaluations)
        self._fine_evaluations = evaluations and max(evaluations - self._most_coarse, 1)
        fine = open_plan(space, self._fine_evaluations)
        self.evaluations = self._most_coarse + fine.evaluations
        self.needs_slopes = fine.needs_slopes
        self._opened: dict[Point, Plan] = {}  # the last fine plan, by its start

    def propose(self, trials: Sequence[Asked]) -> Point | Wait | None:
        uniform = self._uniform(trials)
        if sum(not trial.name for trial in uniform) < self._most_coarse:
            step = self.coarse.propose(uniform)
            if step is not None:
                return step if isinstance(step, Wait) else self.space.everywhere(step)
        elif any(trial.value is None for trial in uniform):
            return Wait()
        return self._fine(uniform).propose(trials)

    def _fine(self, uniform: Sequence[Asked]) -> Plan:
        """The plan for every group, from the best of the coarse trials, which came first."""
        unnamed = sorted((trial for trial in uniform if not trial.name), key=lambda t: t.number)
        coarse = [t for t in uniform if t.name] + unnamed[: self._most_coarse]
        finite = [
            trial for trial in coarse
            if trial.value is not None and math.isfinite(trial.value) and self._is_inside(trial)
        ]  # fmt: skip
        best = min(finite, key=lambda t: (t.value, t.number)).point if finite else self.space.start
        if best not in self._opened:
            space = replace(self.space, start=best)
            self._opened = {best: self._open_plan(space, self._fine_evaluations)}
        return self._opened[best]

    def _is_inside(self, trial: Asked) -> bool:
        pairs = zip(trial.point, self.space.bounds, strict=True)
        return all(low <= w <= high for w, (low, high) in pairs)

    def _uniform(self, trials: Sequence[Asked]) -> list[Asked]:
        """Trials with the same coefficients everywhere, as trials of the coarse space."""
        count = self.space.num_experts
        return [
            replace(trial, point=trial.point[:count], extra=self._summed(trial))
            for trial in trials
            if trial.point == self.space.everywhere(trial.point[:count])
        ]

    def _summed(self, trial: Asked) -> dict:
        """A coefficient that holds everywhere has the sum of the groups' slopes."""
        if "slopes" not in trial.extra:
            return trial.extra
        by_group = np.array(trial.extra["slopes"]).reshape(-1, self.space.num_experts)
        return {**trial.extra, "slopes": by_group.sum(axis=0).tolist()}

    def remarks(self, trials: Sequence[Asked]) -> list[str]:
        uniform = self._uniform(trials)
        return [*self.coarse.remarks(uniform), *self._fine(uniform).remarks(trials)]
