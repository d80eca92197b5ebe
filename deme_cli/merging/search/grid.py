"""The points of a grid search: every combination of a few values for each coefficient. No torch.

N experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from deme_cli.errors import ConfigError
from deme_cli.merging.search.space import Point

Grid = tuple[tuple[float, ...], ...]  # the values tried for each expert
MAX_CANDIDATES = 1_000_000
DEFAULT_VALUES = ((4, (0.0, 0.5, 1.0)), (8, (0.0, 1.0)))  # up to N experts: at most 81, 256 points


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
