"""TIES merging (Yadav et al. 2023, Algorithm 1): trim, elect signs, take the mean of what agrees.

Trim: hat tau_i keeps the `density` share of largest magnitude of tau_i, over the whole vector as
published, or tensor by tensor as mergekit does. Elect: gamma = sgn(sum_i hat tau_i), by element.
Merge: tau = the mean of hat tau_i over A = {i: sgn(hat tau_i) = gamma}, and theta + lambda tau.

Here that is written as task vectors tau'_i = N hat tau_i [i in A] / |A|, so that w_i = lambda / N
each gives exactly the published theta + lambda tau, and coefficients per expert keep their meaning.
Magnitudes equal to the threshold are all kept; where the sum is exactly 0 nothing agrees.
N parents, n elements of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deme_cli.errors import NumericsError
from deme_cli.merging.differences import float_runs, vector_pieces
from deme_cli.merging.lineage import Family
from deme_cli.merging.methods.linear import linear_terms
from deme_cli.merging.methods.method import Terms, vector_terms
from deme_cli.merging.methods.thresholds import kth_largest, magnitudes
from deme_cli.merging.pieces import Run

TRIMS = ("model", "tensor")


class Ties:
    """Trimmed, agreeing task vectors; opening it reads the files twice for the thresholds."""

    is_linear = True
    found = None

    def __init__(self, family: Family, *, density: float, trim: str) -> None:
        self._family, self._density = family, density
        self.transform = None
        if density == 1 and len(family.parents) == 1:
            return  # nothing is trimmed and nothing disagrees
        self.transform = self._trim_and_elect
        if trim == "model":
            threshold = self._threshold(float_runs(family, by_tensor=False))
            self._thresholds = {run.specs[0].name: threshold for run in float_runs(family)}
        else:
            self._thresholds = {
                run.specs[0].name: self._threshold([run])
                for run in float_runs(family)
                if run.num_elements
            }

    def terms(self, name: str, coefficients: Sequence[float]) -> Terms:
        if self.transform is None:
            return linear_terms(self._family, coefficients)
        return vector_terms(coefficients)

    def _threshold(self, runs: list[Run]) -> np.ndarray:
        """The least magnitude kept of each expert (N,), float32.

        Raises NumericsError naming an expert whose difference is not finite.
        """
        count = len(self._family.parents)
        with np.errstate(over="ignore", invalid="ignore"):
            thresholds, are_finite = kth_largest(
                vector_pieces(self._family, runs), count, self._density
            )
        for parent, is_finite in zip(self._family.parents, are_finite, strict=True):
            if not is_finite:
                raise NumericsError(f"{parent.path}: holds weights that are not finite")
        return thresholds

    def _trim_and_elect(self, name: str, start: int, taus: np.ndarray) -> None:
        """tau'_i of Algorithm 1 from tau_i (N, n), in place."""
        taus *= magnitudes(taus) >= self._thresholds[name][:, None]
        agreeing_mean(taus)


def agreeing_mean(taus: np.ndarray) -> None:
    """N hat tau_i [sgn(hat tau_i) = sgn(sum_j hat tau_j)] / |A| from hat tau_i (N, n), in place."""
    elected = np.sign(taus.sum(axis=0))
    agree = taus * elected > 0
    num_agree = np.maximum(agree.sum(axis=0), 1).astype(taus.dtype)
    taus *= agree
    taus *= len(taus) / num_agree
