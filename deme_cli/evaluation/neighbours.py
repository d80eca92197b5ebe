"""Precision, recall, density and coverage: what two sets of images share, by nearest neighbours.

n made images and m real ones, d features. A ball stands about every image, up to its k-th nearest
neighbour in its own set. Features themselves are needed, not their mean and covariance; the figures
depend on n, m and k, so only those of one protocol are compared.
"""

from __future__ import annotations

import numpy as np

from deme_cli.errors import ArtifactError, ConfigError

_ROWS = 1024  # of the distances that are in memory at a time
NAMES = ("precision", "recall", "density", "coverage")


def neighbour_metrics(made: np.ndarray, real: np.ndarray, k: int) -> dict[str, float]:
    """The four figures by their names.  made: (n, d)   real: (m, d)

    precision: share of made images inside a real one's ball; recall: share of real images inside a
    made one's ball (Kynkaanniemi et al. 2019, Eq. 1 and 2).   density: real balls that a made image
    is inside of, by k; coverage: share of real balls with a made image inside (Naeem et al. 2020,
    Eq. 2 and 3).   Raises ConfigError where a set has no k neighbours.
    """
    if made.shape[1] != real.shape[1]:
        raise ArtifactError(f"{made.shape[1]} and {real.shape[1]} features cannot be compared")
    if min(len(made), len(real)) <= k:
        raise ConfigError(
            f"{k} neighbours need more than {k} images on each side, there are {len(made)} made "
            f"and {len(real)} real ones"
        )
    made, real = made.astype(np.float64), real.astype(np.float64)
    made_radii, real_radii = _radii(made, k), _radii(real, k)
    inside_real = np.zeros(len(made), int)  # in how many real balls a made image is
    is_recalled, is_covered = [], []
    for start in range(0, len(real), _ROWS):
        squares = _squared_distances(real[start : start + _ROWS], made)  # (rows, n)
        is_inside = squares <= real_radii[start : start + _ROWS, None]
        inside_real += is_inside.sum(axis=0)
        is_covered.append(is_inside.any(axis=1))
        is_recalled.append((squares <= made_radii).any(axis=1))
    recall, coverage = (np.concatenate(one).mean() for one in (is_recalled, is_covered))
    figures = (inside_real > 0).mean(), recall, inside_real.mean() / k, coverage
    return dict(zip(NAMES, map(float, figures), strict=True))


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each to its k-th nearest other.  (n, d)   ->   (n,)"""
    radii = []
    for start in range(0, len(features), _ROWS):
        squares = _squared_distances(features[start : start + _ROWS], features)
        radii.append(np.partition(squares, k, axis=1)[:, k])  # the nearest is itself
    return np.concatenate(radii)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x_i - y_j|^2, in float64.  x: (n, d)   y: (m, d)   ->   (n, m)"""
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)
    return (squares - 2 * x @ y.T).clip(0)
