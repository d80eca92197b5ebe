"""The kernel distance: an unbiased estimate of the squared maximum mean discrepancy (KID).

d features. Kernel k(x, y) = (x.y / d + 1)^3; the mean over random subsets of both sets
(Binkowski et al. 2018, section 4). It needs the features themselves, not their mean and covariance.
"""

from __future__ import annotations

import numpy as np

from deme_cli.errors import ArtifactError, ConfigError, NumericsError

NUM_SUBSETS = 100
SUBSET_SIZE = 1000


def kernel_distance(
    features1: np.ndarray, features2: np.ndarray, *, num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE, seed: int = 0,
) -> float:  # fmt: skip
    """The mean over `num_subsets` of the unbiased squared discrepancy of random subsets.

    features: (n, d) and (m, d), n, m >= 2; subsets have min(n, m, subset_size) rows, drawn without
    replacement from `seed`. The estimate may be negative.
    """
    if features1.shape[1] != features2.shape[1]:
        raise ArtifactError(
            f"{features1.shape[1]} and {features2.shape[1]} features cannot be compared; "
            f"make both with the same --features"
        )
    size = min(len(features1), len(features2), subset_size)
    if size < 2:
        raise ConfigError(f"a kernel distance needs 2 images or more on each side, found {size}")
    if not (np.isfinite(features1).all() and np.isfinite(features2).all()):
        raise NumericsError("the features are not finite; the images or the extractor are bad")
    draw = np.random.default_rng(seed)
    total = 0.0
    for _ in range(num_subsets):
        x = features1[draw.choice(len(features1), size, replace=False)]
        y = features2[draw.choice(len(features2), size, replace=False)]
        total += squared_discrepancy(x.astype(np.float64), y.astype(np.float64))
    return total / num_subsets


def squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) without the diagonals (Gretton et al. 2012, Eq. 3).

    x, y: (m, d)
    """
    m = len(x)
    within = kernel(x, x) + kernel(y, y)
    across = kernel(x, y)
    return float((within.sum() - np.trace(within)) / (m * (m - 1)) - 2 * across.sum() / (m * m))


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / d + 1)^3 for every pair.  x: (n, d)   y: (m, d)   ->   (n, m)"""
    return (x @ y.T / x.shape[1] + 1) ** 3
