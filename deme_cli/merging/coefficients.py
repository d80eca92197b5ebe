"""The coefficients w_i of Eq. 8: one per expert, the same for all tensors or, by glob, for some;
and the space of them that a search varies.

A group of tensors is a glob over their names, as `mid_block.*`; the first glob that matches a name
decides, and tensors that none matches take the coefficients for all. `groups_of` gives the globs of
the network's blocks or layers. A point of a space holds the N coefficients of its first group, then
those of the next; D = N times the number of groups. No torch.
N experts (experts or task vectors).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate
from functools import cached_property
from typing import Any

from deme_cli.errors import ConfigError

Point = tuple[float, ...]
Grid = tuple[tuple[float, ...], ...]  # the values tried for each expert
MAX_CANDIDATES = 1_000_000
DEFAULT_VALUES = ((4, (0.0, 0.5, 1.0)), (8, (0.0, 1.0)))  # up to N experts: at most 81, 256 points
REST = "*"  # how the tensors of no group are called
# How the names of parts begin, in the order of the network; of the others those with `out` in them
# come last, the rest with the input.
_STAGES = (
    "down_blocks", "mid_block", "transformer_blocks", "single_transformer", "blocks", "up_blocks",
)  # fmt: skip
_BLOCK = re.compile(
    r"((?:down_blocks|up_blocks|(?:single_|joint_)?transformer_blocks|blocks)\.\d+|mid_block)\."
)


@dataclass(frozen=True)
class Coefficients:
    """`values` hold for every tensor (N,), except for those that a glob of `finer` matches (N,)."""

    values: tuple[float, ...]
    finer: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for values in (self.values, *self.finer.values()):
            if len(values) != len(self.values):
                raise ConfigError(
                    f"{len(values)} coefficients where there are {len(self.values)} experts; "
                    f"give one for each"
                )
            if not all(math.isfinite(w) for w in values):
                raise ConfigError(f"coefficients {list(values)}: expected finite numbers")

    def of(self, name: str) -> tuple[float, ...]:
        """The coefficients of the tensor of this name."""
        for matches, values in self._patterns:
            if matches(name):
                return values
        return self.values

    @cached_property
    def _patterns(self) -> list[tuple[Callable[[str], object], tuple[float, ...]]]:
        """Compiled once: hundreds of globs are more than `fnmatch` keeps."""
        return [(re.compile(translate(glob)).match, w) for glob, w in self.finer.items()]


def block_name(name: str) -> str | None:
    """The block of a tensor: down_blocks.0, mid_block, transformer_blocks.3, ...; else None."""
    match = _BLOCK.match(name)
    return match[1] if match else None


def groups_of(names: Iterable[str], per: str) -> list[str]:
    """Globs that divide tensors by `per`: none for model, one per block, or one per layer.

    A block is one of the down, mid and up blocks or a transformer block; what lies outside of them
    (input, output, time embedding) is left to the coefficients for all. A layer is a module with
    weights of its own. Globs of deeper modules come first, so that each matches its own alone.
    """
    if per == "model":
        return []
    if per == "block":
        globs = {f"{block}.*" for name in names if (block := block_name(name))}
    else:
        globs = {f"{name.rpartition('.')[0]}.*" if "." in name else name for name in names}
    return sorted(globs, key=lambda glob: (-glob.count("."), _natural(glob)))


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts down_blocks.2 before down_blocks.10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def network_order(glob: str) -> tuple:
    """A key that sorts groups as the data passes them: input, down, mid, up, output, the rest."""
    if glob == REST:
        return (len(_STAGES) + 1, ())
    top = glob.split(".")[0]
    outside = len(_STAGES) if "out" in top else -1
    stage = next((i for i, part in enumerate(_STAGES) if top.startswith(part)), outside)
    return (stage, tuple(_natural(glob)))


def require_matches(globs: Sequence[str], names: Iterable[str]) -> None:
    """Check that every glob matches a tensor. Raises ConfigError offering the nearest names."""
    from difflib import get_close_matches

    names = list(names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            known = [*groups_of(names, "block"), *groups_of(names, "layer")]
            near = get_close_matches(glob, known, n=3, cutoff=0.3) or known[:3]
            raise ConfigError(
                f"{glob!r} matches no tensor of this model; near names: {', '.join(near)}"
            )


@dataclass(frozen=True)
class Space:
    """The searched coefficients: experts by name, bounds and start per expert, globs of the groups.

    With `has_rest` the last N numbers of a point are those of all tensors that no group matches.
    Globs of `fixed` come first, are not searched, and are none of the groups.
    """

    experts: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]
    start: tuple[float, ...]
    groups: tuple[str, ...] = ()
    has_rest: bool = True
    fixed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, high), w in zip(self.experts, self.bounds, self.start, strict=True):
            if not low <= w <= high or low == high:
                raise ConfigError(
                    f"the bounds {low:g},{high:g} exclude the start {w:g} of expert {name}; "
                    f"set wider bounds, or a start within them, in [merge] of deme.toml"
                )

    @property
    def all_groups(self) -> tuple[str, ...]:
        """The globs of the groups, `*` for the rest."""
        return (*self.groups, REST) if self.has_rest else self.groups

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

    def everywhere(self, coefficients: Sequence[float]) -> Point:
        """The point that gives every group the same N coefficients."""
        return tuple(float(w) for w in coefficients) * len(self.all_groups)

    def coefficients(self, point: Point) -> Coefficients:
        """What a point stands for; without a rest, its place is taken by the mean over groups."""
        n = len(self.experts)
        by_group = {group: point[g * n : (g + 1) * n] for g, group in enumerate(self.all_groups)}
        rest = by_group.pop(REST, None) or self.summary(point)
        return Coefficients(rest, {**self.fixed, **by_group})

    def summary(self, point: Point) -> tuple[float, ...]:
        """One number per expert: the mean over the groups."""
        n = len(self.experts)
        return tuple(sum(point[i::n]) / len(self.all_groups) for i in range(n))

    def slopes(self, by_tensor: Mapping[str, Sequence[float]]) -> list[float]:
        """The gradient (D,) in the order of a point, from <grad, tau_i> (N,) of each tensor.

        Tensors of fixed coefficients do not count.
        """
        globs = [*self.fixed, *self.all_groups]
        totals = [[0.0] * len(self.experts) for _ in globs]
        for name, products in by_tensor.items():
            place = next((i for i, glob in enumerate(globs) if fnmatchcase(name, glob)), None)
            if place is not None:
                totals[place] = [a + b for a, b in zip(totals[place], products, strict=True)]
        return [slope for total in totals[len(self.fixed) :] for slope in total]


def resolve_grid(values: Sequence[Any] | None, num_experts: int) -> Grid:
    """The values for each expert, ascending: given for all, given for each, or the default."""
    if values is None:
        for most, default in DEFAULT_VALUES:
            if num_experts <= most:
                return (default,) * num_experts
        raise ConfigError(
            f"{num_experts} experts make {2**num_experts} candidates with two values each; name "
            f"them, as in --grid 0,{1 / num_experts:.2g}, or one list per expert as in "
            f"--grid '0,1;0;0,0.5;...'"
        )
    lists = for_each(values, num_experts, "grid", "as in --grid '0,1;0,0.5'")
    return tuple(tuple(sorted(set(numbers))) for numbers in lists)


def resolve_bounds(values: Sequence[Any] | None, num_experts: int) -> list[tuple[float, float]]:
    """Lower and upper bound of each expert's coefficient."""
    pairs = for_each(
        values or [-0.5, 1.5], num_experts, "bounds", "as in bounds = [[0, 1], [0, 2]]"
    )
    for pair in pairs:
        if len(pair) != 2:
            raise ConfigError(f"bounds {pair}: expected the lowest and the highest, as in [0, 1]")
    return [(low, high) for low, high in pairs]


def for_each(
    values: Sequence[Any], num_experts: int, setting: str, example: str
) -> list[list[float]]:
    """A list of numbers for each expert, from one for all or one for each."""
    lists = list(values) if any(isinstance(v, list) for v in values) else [values] * num_experts
    if len(lists) != num_experts:
        raise ConfigError(
            f"{setting} has {len(lists)} lists for {num_experts} experts; give one list for all, "
            f"or one for each, {example}"
        )
    for numbers in lists:
        if (
            not isinstance(numbers, list)
            or not numbers
            or not all(type(v) in (int, float) and math.isfinite(v) for v in numbers)
        ):
            raise ConfigError(f"{setting} {numbers!r}: expected a list of finite numbers")
    return [[float(v) for v in numbers] for numbers in lists]


def grid_points(grid: Grid, num_groups: int = 1) -> list[Point]:
    """Every combination of the values in every group, the last coefficient varying first."""
    if (count := math.prod(len(values) for values in grid) ** num_groups) > MAX_CANDIDATES:
        raise ConfigError(f"the grid has {count} candidates; give fewer values")
    return list(itertools.product(*grid * num_groups))
