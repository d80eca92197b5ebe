"""What a merge is asked for, checked before torch is loaded: whose coefficients, and how.

Settings whose values are one for each expert are brought into the order of the experts here and
nowhere else: lists of a deme.toml are in the order of the ranges, lists that were given in the
order of the experts. No torch.
N experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.files import require_output, require_space
from deme_cli.ladder import Rung, parse_ladder
from deme_cli.merging.coefficients import Coefficients, groups_of, require_matches
from deme_cli.merging.lineage import Family, find_base, open_family, open_parents
from deme_cli.merging.methods.known import MethodSettings, fit_coefficients
from deme_cli.merging.power_ema import coefficients_for_length
from deme_cli.merging.search.search import Search, open_search
from deme_cli.merging.search.space import Grid, Space, resolve_bounds, resolve_grid
from deme_cli.run_file import RunFile
from deme_cli.settings import FromFile

CLOSED_FORMS = ("slerp", "model-stock")  # nothing to search for
_TIME = re.compile(r"([0-9.]+)\s*([smh]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Request:
    """A merge as it was asked for; `fixed` are coefficients given for globs of tensors."""

    run: RunFile
    family: Family
    settings: MergeConfig
    fixed: Mapping[str, tuple[float, ...]]
    output: Path
    device: str
    dtype: str
    pipeline: str | None
    force: bool
    ema_length: float | None

    @property
    def method(self) -> MethodSettings:
        """How task vectors are combined."""
        settings = self.settings
        return MethodSettings(settings.method, settings.density, settings.trim, settings.mask_seed)

    @property
    def searches(self) -> bool:
        """Whether coefficients are searched for."""
        return self.settings.search != "none"

    @property
    def reports(self) -> bool:
        """Whether the merged model is measured beside others: as asked, else after a search."""
        return self.searches if self.settings.report is None else self.settings.report

    @property
    def rungs(self) -> list[Rung]:
        return parse_ladder(self.settings.objective, num=self.settings.num)

    @property
    def experts(self) -> tuple[str, ...]:
        """A name for each expert: 1of4, or its file's where two would have the same."""
        labels = [parent.record.label for parent in self.family.parents]
        stems = [parent.path.stem for parent in self.family.parents]
        names = labels if len(set(labels)) == len(labels) else stems
        if len(set(names)) < len(names):
            names = [f"{name} ({index})" for index, name in enumerate(names, start=1)]
        return tuple(names)

    def in_order(self, setting: str, values: Sequence[Any]) -> list[Any]:
        """Values of a setting, one for each expert, in the order of the experts."""
        if not isinstance(getattr(self.settings, setting), FromFile):
            return list(values)
        placed = dict(zip(self.family.by_range, values, strict=True))
        return [placed[index] for index in range(len(values))]

    def grid(self) -> Grid | None:
        """The values tried for each expert, if the search is a grid."""
        if self.settings.search != "grid":
            return None
        grid = resolve_grid(self.settings.grid, len(self.family.parents))
        return tuple(self.in_order("grid", grid))

    def coefficients(self) -> Coefficients | None:
        """Those given, with those of globs, or those of an EMA length; None for none."""
        values, count = self.settings.coefficients, len(self.family.parents)
        if self.ema_length is not None:
            records = [parent.record for parent in self.family.parents]
            return Coefficients(tuple(coefficients_for_length(records, self.ema_length)))
        if values is None and not self.fixed:
            return None
        if values is None:
            values = [1 / count] * count
        elif len(values) != count:
            raise ConfigError(f"{len(values)} coefficients for {count} experts; give one for each")
        return Coefficients(tuple(map(float, self.in_order("coefficients", values))), self.fixed)

    def space(self) -> Space:
        """What a search varies. Raises ConfigError on bounds, start or globs that do not fit."""
        settings, count = self.settings, len(self.family.parents)
        names = [spec.name for spec in self.family.specs]
        require_matches(list(self.fixed), names)
        start = [1 / count] * count if settings.start is None else settings.start
        if len(start) != count:
            raise ConfigError(f"the start has {len(start)} values for {count} experts")
        Coefficients(tuple(start), self.fixed)  # those of globs are as many, and finite
        groups, shares = _groups(self.family, groups_of(names, settings.per), self.fixed)
        return Space(
            experts=self.experts,
            bounds=tuple(self.in_order("bounds", resolve_bounds(settings.bounds, count))),
            start=tuple(self.in_order("start", start)),
            groups=tuple(groups),
            has_rest=shares[-1] > 0,
            fixed=self.fixed,
            shares=tuple(shares if shares[-1] > 0 else shares[:-1]),
        )

    def search(self) -> Search:
        """The search that is asked for."""
        settings = self.settings
        return open_search(
            settings.search, self.space(), self.rungs, grid=self.grid(), seed=settings.seed,
            evaluations=settings.evaluations, with_soup=self.reports,
            seconds=None if settings.time is None else parse_time(settings.time),
        )  # fmt: skip

    def describe(self, objectives: Sequence[Any]) -> dict[str, Any]:
        """Everything the trials depend on; budgets are left out where they can be changed."""
        settings, space, grid = self.settings, self.space(), self.grid()
        return {
            "method": settings.search,
            "parents": [parent.record.fingerprint for parent in self.family.parents],
            "base": self.family.base_record.fingerprint,
            "combination": {"name": self.method.name, **self.method.used},
            "groups": list(space.all_groups),
            "fixed": {glob: list(w) for glob, w in space.fixed.items()},
            "grid": grid,
            "bounds": None if grid else space.bounds,
            "start": list(space.start),
            "evaluations": settings.evaluations if space.groups else None,
            "seed": settings.seed,
            "objectives": [{**one.protocol, "dtype": self.dtype} for one in objectives],
            "keep": [rung.keep for rung in self.rungs[:-1]],
        }


def open_request(
    paths: Sequence[Path], settings: MergeConfig, *, fixed: Mapping[str, Sequence[float]],
    ema_length: float | None, base: Path | None, output: Path, run: RunFile, pipeline: str | None,
    device: str, dtype: str, force: bool,
) -> Request:  # fmt: skip
    """The files behind the arguments, checked to belong together and to fit the settings."""
    _require_sense(settings)
    require_output(output, force=force)
    opened = open_parents(paths, "expert", "task-vector")
    family = open_family(find_base(opened, run, base), opened)
    require_space(output, sum(spec.num_bytes for spec in family.base.tensors.values()))
    if ema_length is not None:
        if settings.method != "linear":
            raise ConfigError("--ema-length is a linear merge; use --method linear")
        if settings.search != "none":
            raise ConfigError("--ema-length makes the coefficients itself; add --search none")
        if settings.coefficients is not None or fixed:
            raise ConfigError(
                "--ema-length makes the coefficients itself; leave out -w and --coefficients-for"
            )
    by_glob = {glob: tuple(values) for glob, values in fixed.items()}
    request = Request(
        run, family, settings, by_glob, output, device, dtype, pipeline, force, ema_length
    )
    if request.searches:
        request.search()
    else:
        fit_coefficients(family, request.coefficients(), request.method)
    return request


def _require_sense(settings: MergeConfig) -> None:
    """Method, search and objective go together. Raises ConfigError saying which do not."""
    method, search, per = settings.method, settings.search, settings.per
    if method in CLOSED_FORMS and search != "none":
        raise ConfigError(
            f"method {method} has a closed form, there is nothing to search for; use --search none"
        )
    if method in CLOSED_FORMS and per != "model":
        raise ConfigError(f"--per {per} goes with methods linear, ties and dare")
    if per != "model" and search == "none":
        raise ConfigError(
            f"--per {per} says what a search varies; add --search gradient, or name coefficients "
            f"with --coefficients-for"
        )
    if search == "grid" and per == "layer":
        raise ConfigError(
            "search grid takes too many candidates for every layer; use --search gradient or cmaes"
        )
    if settings.time is not None:
        parse_time(settings.time)
    first = parse_ladder(settings.objective, num=settings.num)[0]
    if search == "gradient" and first.is_distance:
        raise ConfigError(
            f"search gradient needs an objective without sampling, found {first.name!r}; use "
            f"--objective loss, experts, or stages that begin with one"
        )


def parse_time(text: str) -> float:
    """`90s`, `30m`, `2h` or seconds, as seconds. Raises ConfigError."""
    match = _TIME.fullmatch(text.strip())
    try:
        seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"time {text!r}: expected a duration, as 90s, 30m or 2h")
    return seconds


def _groups(
    family: Family, globs: Sequence[str], fixed: Mapping[str, Any]
) -> tuple[list[str], list[float]]:
    """The globs that decide for any tensor, and how many parameters each decides, the rest last."""
    counts = dict.fromkeys([*fixed, *globs], 0)
    rest = 0
    for spec in family.specs:
        owner = next((glob for glob in counts if fnmatchcase(spec.name, glob)), None)
        if owner is None:
            rest += spec.num_elements
        else:
            counts[owner] += spec.num_elements
    used = [glob for glob in globs if counts[glob] and glob not in fixed]
    return used, [float(counts[glob]) for glob in used] + [float(rest)]
