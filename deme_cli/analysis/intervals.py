"""How far a mean over draws is off: 95 % intervals for images drawn anew.

Draws that share an image are not independent, so they count as one cluster. That timesteps are
spread evenly is left out, so intervals are a little too wide.
m values, G clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MEANING = "95 %, over images (draws of one image are a cluster)"


@dataclass(frozen=True)
class Estimate:
    """A mean over draws and the half-width of its 95 % interval; nan for one image alone."""

    mean: float
    half: float

    @property
    def is_told_from_zero(self) -> bool:
        return abs(self.mean) > self.half


def estimate(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """The mean of values (m,) with the half-width of its 95 % interval over clusters (m,).

    The cluster-robust variance of a mean, G / (G - 1) sum_g (sum of residuals in g)^2 / m^2, with
    Student's t of G - 1 degrees of freedom (Cameron & Miller 2015, section II). Both are nan where
    a value is not finite.
    """
    from scipy.special import stdtrit

    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(values.mean())
        _, cluster = np.unique(clusters, return_inverse=True)
        sums = np.bincount(cluster.reshape(-1), weights=values - mean)
        if len(sums) < 2:
            return Estimate(mean, float("nan"))
        variance = len(sums) / (len(sums) - 1) * float(sums @ sums) / len(values) ** 2
    return Estimate(mean, float(stdtrit(len(sums) - 1, 0.975)) * variance**0.5)
