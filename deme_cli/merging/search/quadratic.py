"""A response surface of second order: fit it to a designed set of points, go to its least value.

Box & Wilson 1951, with a region of trust that shrinks (Conn et al. 2009, chapter 10). The surface
has (D+1)(D+2)/2 terms; a round evaluates as many points around the best so far (centre, one step
along each number, one along each pair, and the other way along each number), fits by weighted least
squares to all trials, and tries the least point of the surface within the bounds.
D searched numbers, n trials.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deme_cli.merging.search.plan import Known, Plan, Wait, needed
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import Asked, known_values

ROUNDS = 2
FIRST_RADIUS, SHRINK = 0.25, 0.4  # of the width of the box
_ROUNDING = 1e-4  # of a surface, what single precision leaves
_STARTS = 16  # of the local minimisations of a surface that may be a saddle


class Quadratic(Plan):
    """Rounds of a design and the least point of the surface fitted to it."""

    def __init__(self, space: Space) -> None:
        self.space = space
        terms = num_terms(space.dimensions)
        self.evaluations = ROUNDS * (terms + 1)
        self._low, high = np.array(space.box).T
        self._width = high - self._low

    def propose(self, trials: Sequence[Asked]) -> Point | Wait | None:
        """A round sees the references and the rounds before it, so all processes fit the same."""
        known = known_values(trials)
        used = sorted(trial.point for trial in trials if trial.name)
        centre, radius = self._unit([self.space.start_point])[0], FIRST_RADIUS
        while radius > 1e-3:
            used += [self._point(x) for x in design_around(centre, radius)]
            if (step := needed(used, known)) is not None:
                return step
            least = self._point(self._least(_finite(used, known), centre, radius))
            if (step := needed([least], known)) is not None:
                return step
            used.append(least)
            centre, radius = self._best(_finite(used, known)), radius * SHRINK
        return None

    def _point(self, x: np.ndarray) -> Point:
        """From the unit cube to coefficients; rounded so that the same point is the same number."""
        return tuple(float(w) for w in np.round(self._low + x * self._width, 12))

    def _unit(self, points: Sequence[Point]) -> np.ndarray:
        return (np.array(points) - self._low) / self._width

    def _best(self, values: Mapping[Point, float]) -> np.ndarray:
        """The best of these points, in the unit cube."""
        best = min(values, key=lambda p: (values[p], p)) if values else self.space.start_point
        return np.clip(self._unit([best])[0], 0, 1)

    def _least(
        self, values: Mapping[Point, float], centre: np.ndarray, radius: float
    ) -> np.ndarray:
        if not values:
            return centre
        points, found = self._unit(list(values)), np.array(list(values.values()))
        return fit_surface(points, found, centre, radius).least(centre)


def _finite(points: Sequence[Point], known: Known) -> dict[Point, float]:
    """The values of these points, where they have a finite one."""
    values = {point: known.get(point) for point in points}
    return {p: v for p, v in values.items() if v is not None and math.isfinite(v)}


def num_terms(dimensions: int) -> int:
    """1 + D + D (D + 1) / 2."""
    return (dimensions + 1) * (dimensions + 2) // 2


def design_around(centre: np.ndarray, radius: float) -> list[np.ndarray]:
    """(D+1)(D+2)/2 points in the unit cube from which every term can be told apart.

    The centre, x_i + r, x_i - r, and x_i + r with x_j + r. The centre is moved so that they fit.
    """
    centre = np.clip(centre, radius, 1 - radius)
    steps = radius * np.eye(len(centre))
    pairs = [a + b for a, b in itertools.combinations(steps, 2)]
    return [centre, *(centre + s for s in steps), *(centre - s for s in steps),
            *(centre + s for s in pairs)]  # fmt: skip


@dataclass(frozen=True)
class Surface:
    """a + b.x + x.C.x / 2 over the unit cube."""

    constant: float
    slope: np.ndarray
    curvature: np.ndarray

    def value(self, x: np.ndarray) -> float:
        return float(self.constant + self.slope @ x + x @ self.curvature @ x / 2)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self.slope + self.curvature @ x

    def least(self, near: np.ndarray) -> np.ndarray:
        """The least point in the cube: the best of several descents, the first one from `near`.

        From there alone where the surface is convex; of any scale, as losses may differ by little.
        """
        from scipy.optimize import minimize

        from deme_cli.evaluation.threads import fitting_threads

        size = max(np.abs(self.slope).max(), np.abs(self.curvature).max()) or 1.0
        scaled = Surface(0.0, self.slope / size, self.curvature / size)
        draw, box = np.random.default_rng(0), [(0.0, 1.0)] * len(near)
        is_convex = np.linalg.eigvalsh(scaled.curvature).min() > -_ROUNDING
        starts = [near, *([] if is_convex else draw.uniform(size=(_STARTS, len(near))))]
        with fitting_threads(len(near)):
            found = [
                minimize(
                    scaled.value, x, jac=scaled.gradient, bounds=box, method="L-BFGS-B",
                    options={"ftol": 1e-14, "gtol": 1e-9},
                ).x
                for x in starts
            ]  # fmt: skip
        return min(found, key=scaled.value)


def fit_surface(
    points: np.ndarray, values: np.ndarray, centre: np.ndarray, radius: float
) -> Surface:
    """The surface nearest to values (n,) at points (n, D), those near the centre counting most.

    A squared error weighs exp(-(distance / r)^2 / 2), so that a later, smaller round is not bent by
    the points of an earlier one. Of several surfaces that fit equally well, the one with the least
    coefficients.
    """
    count = points.shape[1]
    shift = points - centre
    weight = np.exp(-np.square(shift / radius).sum(axis=1) / 4) + 1e-6  # of an error
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    columns = [np.ones(len(points)), *shift.T, *(shift[:, i] * shift[:, j] for i, j in pairs)]
    terms = np.stack(columns, axis=1) * weight[:, None]
    solution, *_ = np.linalg.lstsq(terms, values * weight, rcond=1e-10)
    slope, curvature = solution[1 : count + 1], np.zeros((count, count))
    for (i, j), c in zip(pairs, solution[count + 1 :], strict=True):
        curvature[i, j] += c
        curvature[j, i] += c
    constant = solution[0] - slope @ centre + centre @ curvature @ centre / 2
    return Surface(constant, slope - curvature @ centre, curvature)
