"""Tree-structured Parzen estimators of optuna (Bergstra et al. 2011; Falkner et al. 2018).

The model is fitted afresh to all trials for each proposal, seeded by their number; points that
others are evaluating count as bad ones meanwhile. A broken candidate counts as the worst of the
others, so that its surroundings are avoided. No point is tried twice: in place of one that is known
a random one is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from deme_cli.merging.search.plan import Plan
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import Asked

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

PER_NUMBER, MOST = 30, 1000
FIRST_RANDOM = 10  # trials before the model is trusted, the sampler's default


class Bayesian(Plan):
    """The start comes first."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        self.evaluations = min(PER_NUMBER * space.dimensions, MOST)

    def propose(self, trials: Sequence[Asked]) -> Point:
        import optuna
        from optuna.distributions import BaseDistribution, FloatDistribution
        from optuna.trial import TrialState, create_trial

        known = {trial.point for trial in trials}
        if self.space.start_point not in known:
            return self.space.start_point
        box = self.space.box
        kinds: dict[str, BaseDistribution] = {
            f"w{i}": FloatDistribution(low, high) for i, (low, high) in enumerate(box)
        }
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=self._sampler(len(trials)))
        finite = [t.value for t in trials if t.value is not None and math.isfinite(t.value)]
        for trial in trials:
            if not all(low <= w <= high for w, (low, high) in zip(trial.point, box, strict=True)):
                continue
            params = dict(zip(kinds, trial.point, strict=True))
            if trial.value is None:
                study.add_trial(
                    create_trial(state=TrialState.RUNNING, params=params, distributions=kinds)
                )
            elif finite:
                value = min(trial.value, max(finite))
                study.add_trial(create_trial(value=value, params=params, distributions=kinds))
        found = study.ask(kinds).params
        point = tuple(float(found[name]) for name in kinds)
        return self._random(len(trials)) if point in known else point

    def _random(self, count: int) -> Point:
        low, high = np.array(self.space.box).T
        drawn = np.random.default_rng([self.seed, count]).uniform(low, high)
        return tuple(map(float, drawn))

    def _sampler(self, count: int) -> BaseSampler:
        import optuna

        seed = (self.seed + 7919 * count) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate: "experimental"
            return optuna.samplers.TPESampler(
                n_startup_trials=FIRST_RANDOM, multivariate=True, constant_liar=True, seed=seed
            )
