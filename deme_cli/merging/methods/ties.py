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

import numpy as np

from deme_cli.errors import NumericsError
from deme_cli.merging.differences import float_runs, vector_pieces
from deme_cli.merging.lineage import Family
from deme_cli.merging.methods.linear import linear
from deme_cli.merging.methods.method import Method, vector_terms
from deme_cli.merging.methods.thresholds import kth_largest, magnitudes
from deme_cli.merging.pieces import Run

TRIMS = ("model", "tensor")


def ties(family: Family, *, density: float, trim: str) -> Method:
    """Trimmed, agreeing task vectors; opening it reads the files twice for the thresholds."""
    if density == 1 and len(family.parents) == 1:
        return linear(family)  # nothing is trimmed and nothing disagrees
    thresholds = _thresholds(family, density, trim)

    def trim_and_elect(name: str, start: int, taus: np.ndarray) -> None:
        taus *= magnitudes(taus) >= thresholds[name][:, None]
        agreeing_mean(taus)

    return Method(vector_terms, trim_and_elect)


def _thresholds(family: Family, density: float, trim: str) -> dict[str, np.ndarray]:
    """The least magnitude kept of each expert (N,), float32, by tensor."""
    tensors = [run for run in float_runs(family) if run.num_elements]
    if trim == "tensor":
        return {run.specs[0].name: _threshold(family, density, [run]) for run in tensors}
    shared = _threshold(family, density, float_runs(family, by_tensor=False))
    return {run.specs[0].name: shared for run in tensors}


def _threshold(family: Family, density: float, runs: list[Run]) -> np.ndarray:
    """The least magnitude kept of each expert (N,) over all of `runs`.

    Raises NumericsError naming an expert whose difference is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        thresholds, are_finite = kth_largest(
            vector_pieces(family, runs), len(family.parents), density
        )
    for parent, is_finite in zip(family.parents, are_finite, strict=True):
        if not is_finite:
            raise NumericsError(f"{parent.path}: holds weights that are not finite")
    return thresholds


def agreeing_mean(taus: np.ndarray) -> None:
    """N hat tau_i [sgn(hat tau_i) = sgn(sum_j hat tau_j)] / |A| from hat tau_i (N, n), in place."""
    elected = np.sign(taus.sum(axis=0))
    agree = taus * elected > 0
    num_agree = np.maximum(agree.sum(axis=0), 1).astype(taus.dtype)
    taus *= agree
    taus *= len(taus) / num_agree
