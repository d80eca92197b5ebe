"""Descent along the gradient of the coefficients: dL/dw_i = <grad_theta L(theta(w)), tau_i>.

One backward pass and N inner products give the whole gradient, so a step costs about three
forwards however many coefficients there are. L-BFGS-B (Byrd et al. 1995) by scipy, or Adam (Kingma
& Ba 2015) by torch, its rate falling along a cosine. The optimiser is run again from its start over
the trials that are known, and asks for the first point that is not. D searched numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from deme_cli.evaluation.threads import fitting_threads
from deme_cli.merging.search.plan import WAIT, Wait
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import Asked

STEPS = 20
FIRST_STEP = 0.3  # how far the first trial lies from the start
ADAM_RATE = 0.1


class _Unknown(Exception):
    """The optimiser wants a point that has not been evaluated."""

    def __init__(self, point: Point) -> None:
        self.point = point


class _Broken(Exception):
    """The objective was not finite where the optimiser went."""


class Descent:
    """`optimizer`: lbfgs or adam; `evaluations` is the most that it may ask for."""

    needs_slopes = True

    def __init__(self, space: Space, optimizer: str, evaluations: int | None) -> None:
        self.space, self.optimizer = space, optimizer
        self.evaluations = evaluations or STEPS

    def propose(self, trials: Sequence[Asked]) -> Point | Wait | None:
        known = {trial.point: trial for trial in trials}

        def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
            point = tuple(map(float, x))
            trial = known.get(point)
            if trial is None or trial.value is None:
                raise _Unknown(point)
            if not math.isfinite(trial.value):
                raise _Broken
            return trial.value, np.array(trial.extra["slopes"])

        try:
            if self.optimizer == "adam":
                self._adam(evaluate)
            else:
                self._lbfgs(evaluate)
        except _Broken:
            return None
        except _Unknown as unknown:
            waits = unknown.point in known and known[unknown.point].value is None
            return WAIT if waits else unknown.point
        return None

    def _lbfgs(self, evaluate) -> None:
        """The objective is scaled so that the first step has a sensible length."""
        from scipy.optimize import minimize

        start = np.array(self.space.start_point)
        first, slope = evaluate(start)
        size = np.linalg.norm(slope)
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

    def _adam(self, evaluate) -> None:
        import torch

        low, high = torch.tensor(self.space.box, dtype=torch.float64).T
        w = torch.tensor(self.space.start_point, dtype=torch.float64)
        adam = torch.optim.Adam([w], lr=ADAM_RATE)
        for step in range(self.evaluations):
            _, slope = evaluate(w.numpy())
            w.grad = torch.from_numpy(slope)
            for group in adam.param_groups:
                group["lr"] = ADAM_RATE * (1 + math.cos(math.pi * step / self.evaluations)) / 2
            adam.step()
            w.clamp_(low, high)

    def remarks(self, trials: Sequence[Asked]) -> list[str]:
        """Says where the descent came to an early end."""
        if all(trial.value is None or math.isfinite(trial.value) for trial in trials):
            return []
        return ["the descent ended at a point whose objective was not finite; narrow --bounds, or "
                "take --search cmaes, which passes over such points"]  # fmt: skip


def slopes_of(space: Space, by_tensor: Mapping[str, Sequence[float]]) -> list[float]:
    """The gradient (D,) in the order of a point, from <grad, tau_i> of each tensor.

    Tensors of fixed coefficients do not count.
    """
    from fnmatch import fnmatchcase

    groups = space.all_groups
    total = np.zeros((len(groups), space.num_experts))
    for name, products in by_tensor.items():
        if any(fnmatchcase(name, glob) for glob in space.fixed):
            continue
        for index, glob in enumerate(groups):
            if fnmatchcase(name, glob):
                total[index] += products
                break
    return [float(v) for v in total.ravel()]
