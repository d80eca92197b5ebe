"""Which coefficients the objective depends on: PED-ANOVA (Watanabe et al. 2023) over the trials."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deme_cli.merging.search.trials import Trial

FEWEST = 12


def importances(trials: Sequence[Trial], labels: Sequence[str]) -> dict[str, float] | None:
    """A share for each of the D numbers by its label, summing to 1; None for too few trials.

    Of the lowest rung, within the values that were tried.
    """
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.trial import TrialState, create_trial

    lowest = [t for t in trials if t.rung == 0 and math.isfinite(t.objective)]
    if len(lowest) < FEWEST or len(labels) < 2:
        return None
    kinds: dict[str, BaseDistribution] = {}
    for i, label in enumerate(labels):
        reached = [t.point[i] for t in lowest]
        kinds[label] = FloatDistribution(min(reached), max(reached))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    study.add_trials(
        [
            create_trial(
                state=TrialState.COMPLETE,
                value=trial.objective,
                distributions=kinds,
                params=dict(zip(kinds, trial.point, strict=True)),
            )
            for trial in lowest
        ]
    )
    found = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    return dict(found)
