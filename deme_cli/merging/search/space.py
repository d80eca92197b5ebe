"""What a search varies: a point of D numbers, and the coefficients of Eq. 8 that it stands for.

D = N times the number of groups of tensors; a point holds the N coefficients of the first group,
then those of the next. With `has_rest` the last N are those of all tensors that no group matches.
Globs of `fixed` come first, are not searched, and are none of the groups. No torch.
N experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from deme_cli.errors import ConfigError
from deme_cli.merging.coefficients import Coefficients

Point = tuple[float, ...]
REST = "*"  # how the tensors of no group are called


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
