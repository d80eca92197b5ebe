"""Which points a landscape has: axes through the origin, wide enough for the models on it.

The origin is always a point, so that others are compared with what was measured there; on a line
both ends are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deme_cli.analysis_config import LandscapeConfig

Index = tuple[int, ...]


def axes_of(coordinates: np.ndarray, config: LandscapeConfig) -> list[np.ndarray]:
    """The coordinates of the points along each axis, in rising order.

    coordinates: (N, k) of the models besides the origin; unused on a random plane.
    """
    reach, points = config.reach, config.points
    if config.along == "random":
        return [axis_through_zero(-reach, reach, points)] * 2
    if config.along == "line":
        return [line_axis(reach, points)]
    low = np.minimum(coordinates.min(axis=0), 0)
    high = np.maximum(coordinates.max(axis=0), 0)
    margin = reach * (high - low).max()
    return [
        axis_through_zero(a - margin, b + margin, points) for a, b in zip(low, high, strict=True)
    ]


def axis_through_zero(low: float, high: float, points: int) -> np.ndarray:
    """Evenly spaced values of which one is 0, from `low` < 0 or below to `high` > 0 or above."""
    zero = int(np.clip(round(-low / (high - low) * (points - 1)), 1, points - 2))
    step = max(-low / zero, high / (points - 1 - zero))
    return (np.arange(points) - zero) * step


def line_axis(reach: float, points: int) -> np.ndarray:
    """Evenly spaced values with 0 and 1 among them, and about `reach` past each."""
    beyond = min(round((points - 1) * reach / (1 + 2 * reach)), (points - 2) // 2)
    return (np.arange(points) - beyond) / (points - 1 - 2 * beyond)


def origin_index(axes: Sequence[np.ndarray]) -> Index:
    """Where all coordinates are 0."""
    return tuple(int(np.flatnonzero(axis == 0)[0]) for axis in axes)


def at_origin(losses: np.ndarray, axes: Sequence[np.ndarray]) -> np.ndarray:
    """Of losses (G, points, ...) those where all coordinates are 0, (G,)."""
    place = np.ravel_multi_index(origin_index(axes), losses.shape[1:])
    return losses.reshape(len(losses), -1)[:, place]


def is_at_edge(index: Index, axes: Sequence[np.ndarray]) -> bool:
    """Whether a point is an outermost one."""
    return any(i in (0, len(axis) - 1) for i, axis in zip(index, axes, strict=True))
