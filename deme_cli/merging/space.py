"""What a search varies, and what it has found: a point of D numbers, the coefficients of Eq. 8 that
it stands for, the values of a grid, the bounds of other searches; a trial for each evaluation.

D = N times the number of groups of tensors; a point holds the N coefficients of the first group,
then those of the next. With `has_rest` the last N are those of all tensors that no group matches.
Globs of `fixed` come first, are not searched, and are none of the groups. No torch.
N experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from deme_cli.errors import ConfigError, NumericsError
from deme_cli.merging.coefficients import REST, Coefficients

Point = tuple[float, ...]
Grid = tuple[tuple[float, ...], ...]  # the values tried for each expert
MAX_CANDIDATES = 1_000_000
DEFAULT_VALUES = ((4, (0.0, 0.5, 1.0)), (8, (0.0, 1.0)))  # up to N experts: at most 81, 256 points
BASE_NAME, MEAN_NAME, SOUP_NAME = "base", "1/N each", "soup candidate"
REFERENCES = (BASE_NAME, MEAN_NAME)
BY_RANGE, SLOPES = "by_range", "slopes"  # in `extra`: the loss on each expert's range; gradient


@dataclass(frozen=True)
class Space:
    """The searched coefficients: experts by name, globs of the groups, bounds and start per expert.

    `shares` holds the share of all parameters that each group has, in the order of the groups, the
    rest last; it serves the one number per expert that a merge of many groups is summed up in.
    """

    experts: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]
    start: tuple[float, ...]
    groups: tuple[str, ...] = ()
    has_rest: bool = True
    fixed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    shares: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name, (low, high), w in zip(self.experts, self.bounds, self.start, strict=True):
            if not low < high:
                raise ConfigError(f"bounds {low:g},{high:g}: expected the lower bound first")
            if not low <= w <= high:
                raise ConfigError(
                    f"the bounds {low:g},{high:g} exclude the start {w:g} of expert {name}; "
                    f"set wider bounds, or a start within them, in [merge] of deme.toml"
                )

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def all_groups(self) -> tuple[str, ...]:
        """The globs of the groups, `*` for the rest."""
        return (*self.groups, REST) if self.has_rest else self.groups

    @property
    def dimensions(self) -> int:
        return self.num_experts * len(self.all_groups)

    @property
    def labels(self) -> list[str]:
        """A name for each of the D numbers: `1of4`, or `1of4 mid_block.*` with groups."""
        if not self.groups:
            return list(self.experts)
        return [f"{expert} {group}" for group in self.all_groups for expert in self.experts]

    @property
    def box(self) -> list[tuple[float, float]]:
        """Lower and upper bound of each of the D numbers."""
        return list(self.bounds) * len(self.all_groups)

    def holds(self, point: Point) -> bool:
        """Whether a point lies within the bounds."""
        return all(low <= w <= high for w, (low, high) in zip(point, self.box, strict=True))

    def everywhere(self, coefficients: Sequence[float]) -> Point:
        """The point that gives every group the same N coefficients."""
        return tuple(float(w) for w in coefficients) * len(self.all_groups)

    @property
    def start_point(self) -> Point:
        return self.everywhere(self.start)

    @property
    def base(self) -> Point:
        """All 0: the base itself, where nothing is fixed to something else."""
        return self.everywhere([0.0] * self.num_experts)

    @property
    def mean(self) -> Point:
        """1/N each."""
        return self.everywhere([1 / self.num_experts] * self.num_experts)

    def by_group(self, point: Point) -> dict[str, tuple[float, ...]]:
        """The N coefficients of each group, `*` for the rest."""
        n = self.num_experts
        return {group: point[g * n : (g + 1) * n] for g, group in enumerate(self.all_groups)}

    def coefficients(self, point: Point) -> Coefficients:
        """What a point stands for; without a rest, its place is taken by the mean over groups."""
        by_group = self.by_group(point)
        rest = by_group.pop(REST, None) or self.summary(point)
        return Coefficients(rest, {**self.fixed, **by_group})

    def slopes(self, by_tensor: Mapping[str, Sequence[float]]) -> list[float]:
        """The gradient (D,) in the order of a point, from <grad, tau_i> (N,) of each tensor.

        Tensors of fixed coefficients do not count.
        """
        globs = [*self.fixed, *self.all_groups]
        totals = [[0.0] * self.num_experts for _ in globs]
        for name, products in by_tensor.items():
            place = next((i for i, glob in enumerate(globs) if fnmatchcase(name, glob)), None)
            if place is not None:
                totals[place] = [a + b for a, b in zip(totals[place], products, strict=True)]
        return [slope for total in totals[len(self.fixed) :] for slope in total]

    def summary(self, point: Point) -> tuple[float, ...]:
        """One number per expert: the mean over the groups, weighed by their parameters."""
        groups = list(self.by_group(point).values())
        total = sum(self.shares) or 1.0
        return tuple(
            sum(share * w[i] for share, w in zip(self.shares, groups, strict=True)) / total
            for i in range(self.num_experts)
        )


def resolve_grid(values: Sequence[Any] | None, num_experts: int) -> Grid:
    """The values for each expert: given for all, given for each, or the default.

    Raises ConfigError on a wrong number of lists, on what is no finite number, on an empty list, on
    more than MAX_CANDIDATES points, and without values for more than eight experts.
    """
    if values is None:
        for most, default in DEFAULT_VALUES:
            if num_experts <= most:
                return (default,) * num_experts
        raise ConfigError(
            f"{num_experts} experts make {2**num_experts} candidates with two values each; name "
            f"them, as in --grid 0,{1 / num_experts:.2g}, or one list per expert as in "
            f"--grid '0,1;0;0,0.5;...'"
        )
    lists = list(values) if any(isinstance(v, list) for v in values) else [values] * num_experts
    if len(lists) != num_experts:
        raise ConfigError(
            f"the grid has {len(lists)} lists of values for {num_experts} experts; "
            f"give one list for all, or one for each"
        )
    grid = tuple(_checked_values(entry) for entry in lists)
    if (count := math.prod(len(entry) for entry in grid)) > MAX_CANDIDATES:
        raise ConfigError(f"the grid has {count} candidates; give fewer values")
    return grid


def _checked_values(values: Any) -> tuple[float, ...]:
    """Distinct finite numbers in ascending order."""
    numeric = isinstance(values, list | tuple) and len(values) > 0
    if not numeric or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    ):
        raise ConfigError(f"grid values {values!r}: expected a list of finite numbers")
    return tuple(sorted({float(v) for v in values}))


def grid_points(grid: Grid) -> list[Point]:
    """Every combination of the values, the last coefficient varying first."""
    return list(itertools.product(*grid))


def resolve_bounds(values: Sequence[Any] | None, num_experts: int) -> list[tuple[float, float]]:
    """Lower and upper bound of each expert's coefficient. Raises ConfigError on another shape."""
    values = [-0.5, 1.5] if values is None else list(values)
    pairs = values if any(isinstance(v, list) for v in values) else [values] * num_experts
    if len(pairs) != num_experts:
        raise ConfigError(
            f"the bounds have {len(pairs)} pairs for {num_experts} experts; give one pair for all, "
            f"or one for each, as in bounds = [[0, 1], [0, 2]]"
        )
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConfigError(f"bounds {pair}: expected the lowest and the highest, as in [0, 1]")
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in pair):
            raise ConfigError(f"bounds {pair}: expected finite numbers")
    return [(float(low), float(high)) for low, high in pairs]


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluation: a point of the space and its objective, None while it is being evaluated and
    infinite where it was not finite.

    `stage` counts the objectives of successive halving from 0; `name` tells what a reference point
    is; `began` and `ended` are seconds since the epoch; `extra` is what else was measured.
    """

    index: int
    stage: int
    point: Point
    objective: float | None
    name: str = ""
    began: float = 0.0
    ended: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.objective is not None

    @property
    def value(self) -> float:
        """The objective, infinite where there is none (yet)."""
        return math.inf if self.objective is None else self.objective

    @property
    def seconds(self) -> float:
        return max(self.ended - self.began, 0.0)


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """From best to worst: by objective, then by the norm of the point, then by number.

    Raises NumericsError where no objective is finite.
    """
    if not any(math.isfinite(trial.value) for trial in trials):
        raise NumericsError(
            "the objective is not finite for any candidate; look for NaN in the experts, "
            "or use --dtype fp32"
        )
    return sorted(trials, key=lambda t: (t.value, math.hypot(*t.point), t.index))


def seconds_spent(trials: Sequence[Trial]) -> float:
    """Time in which at least one finished trial was under way, whoever ran it."""
    total, until = 0.0, -math.inf
    for trial in sorted((t for t in trials if t.is_done), key=lambda t: t.began):
        total += max(trial.ended - max(trial.began, until), 0.0)
        until = max(until, trial.ended)
    return total
