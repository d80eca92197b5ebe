"""Descent along the gradient of the coefficients: dL/dw_i = <grad_theta L(theta(w)), tau_i>.

One backward pass and N inner products give the whole gradient, so a step costs about three
forwards however many coefficients there are. L-BFGS-B (Byrd et al. 1995) by scipy is run again from
its start over the trials that are known, and asks for the first point that is not.
D searched numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from deme_cli.evaluation.threads import fitting_threads
from deme_cli.merging.search.plan import WAIT, Plan, Wait
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import Asked

STEPS = 20
FIRST_STEP = 0.3  # how far the first trial lies from the start
Evaluate = Callable[[np.ndarray], tuple[float, np.ndarray]]  # a point: its value and slopes


class _Answer(Exception):
    """Ends the optimiser's run where it wants a point that has no value: what to do instead."""

    def __init__(self, step: Point | Wait | None) -> None:
        self.step = step


class Descent(Plan):
    """`evaluations` is the most that it may ask for."""

    needs_slopes = True

    def __init__(self, space: Space, evaluations: int | None) -> None:
        self.space = space
        self.evaluations = evaluations or STEPS

    def propose(self, trials: Sequence[Asked]) -> Point | Wait | None:
        known = {trial.point: trial for trial in trials}

        def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
            point = tuple(map(float, x))
            trial = known.get(point)
            if trial is None:
                raise _Answer(point)
            if trial.value is None:
                raise _Answer(WAIT)
            if not math.isfinite(trial.value):
                raise _Answer(None)
            return trial.value, np.array(trial.extra["slopes"])

        try:
            self._lbfgs(evaluate)
        except _Answer as answer:
            return answer.step
        return None

    def _lbfgs(self, evaluate: Evaluate) -> None:
        """The objective is scaled so that the first step has a sensible length."""
        from scipy.optimize import minimize

        start = np.array(self.space.start_point)
        first, slope = evaluate(start)
        size = float(np.linalg.norm(slope))
        if not size:
            return
        scale = FIRST_STEP / size

        def scaled(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = evaluate(x)
            return (value - first) * scale, slope * scale

        with fitting_threads(len(start)):
            minimize(
                scaled, start, jac=True, method="L-BFGS-B", bounds=self.space.box,
                options={"maxfun": self.evaluations, "ftol": 1e-5, "gtol": 1e-5},
            )  # fmt: skip

    def remarks(self, trials: Sequence[Asked]) -> list[str]:
        """Says where the descent came to an early end."""
        if all(trial.value is None or math.isfinite(trial.value) for trial in trials):
            return []
        return [
            "the descent ended at a point whose objective was not finite; set narrower bounds in "
            "[merge], or take --search cmaes, which passes over such points"
        ]
