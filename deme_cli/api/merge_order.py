"""What a `deme merge` is about, checked before torch is loaded: whose coefficients, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.merge_settings import resolve_bounds, rungs_of, searches
from deme_cli.config import (
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    MergeConfig,
    SampleConfig,
)
from deme_cli.errors import ConfigError
from deme_cli.ladder import Rung
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.merging.coefficients import Coefficients
    from deme_cli.merging.lineage import Family
    from deme_cli.merging.methods.known import MethodSettings
    from deme_cli.merging.search.grid import Grid
    from deme_cli.merging.search.measure import Measure
    from deme_cli.merging.search.space import Space


LISTS = frozenset({"coefficients", "grid", "bounds", "start"})  # settings with a value per expert


@dataclass(frozen=True)
class Order:
    """What was asked: the family, the settings, and where the result goes.

    `fixed` are coefficients given for globs of tensors; `by_range` names the settings whose lists
    are in the order of the ranges, as in deme.toml; others are in the order of the arguments.
    """

    family: Family
    settings: MergeConfig
    fixed: Mapping[str, tuple[float, ...]]
    output: Path
    device: str
    dtype: str
    force: bool
    by_range: frozenset[str] = frozenset()

    @property
    def method(self) -> MethodSettings:
        from deme_cli.merging.methods.known import MethodSettings

        settings = self.settings
        return MethodSettings(settings.method, settings.density, settings.trim, settings.mask_seed)

    @property
    def search(self) -> str:
        return self.settings.search

    @property
    def reports(self) -> bool:
        """Whether the merged model is measured beside others: as asked, else after a search."""
        asked = self.settings.report
        return searches(self.settings) if asked is None else asked

    @property
    def rungs(self) -> list[Rung]:
        return rungs_of(self.settings)

    @property
    def experts(self) -> tuple[str, ...]:
        """A name for each parent: 1of4, or its file's where two would have the same."""
        labels = [parent.record.label for parent in self.family.parents]
        stems = [parent.path.stem for parent in self.family.parents]
        names = labels if len(set(labels)) == len(labels) else stems
        if len(set(names)) < len(names):
            names = [f"{name} ({index})" for index, name in enumerate(names, start=1)]
        return tuple(names)

    def listed(self, name: str, values: Sequence[Any]) -> list[Any]:
        """Values of the setting `name` in the order of the arguments."""
        if name not in self.by_range:
            return list(values)
        placed = dict(zip(self.family.by_range, values, strict=True))
        return [placed[index] for index in range(len(values))]

    def grid(self) -> Grid:
        """The values tried for each argument."""
        from deme_cli.merging.search.grid import resolve_grid

        grid = resolve_grid(self.settings.grid, len(self.family.parents))
        return tuple(self.listed("grid", grid)) if self.settings.grid else grid

    def given(self) -> Coefficients | None:
        """The coefficients as given, with those of globs; None where there are none."""
        from deme_cli.merging.coefficients import Coefficients

        values, count = self.settings.coefficients, len(self.family.parents)
        if values is None and not self.fixed:
            return None
        if values is None:
            values = [1 / count] * count
        elif len(values) != count:
            raise ConfigError(f"{len(values)} coefficients for {count} experts; give one for each")
        else:
            values = self.listed("coefficients", values)
        return Coefficients(tuple(map(float, values)), self.fixed)

    def space(self) -> Space:
        """What a search varies. Raises ConfigError on bounds, start or globs that do not fit."""
        from deme_cli.merging.coefficients import Coefficients, groups_of, require_matches
        from deme_cli.merging.search.space import Space

        settings, count = self.settings, len(self.family.parents)
        names = [spec.name for spec in self.family.base.tensors.values()]
        names += [spec.name for spec in self.family.projections]
        require_matches(list(self.fixed), names)
        start = [1 / count] * count if settings.start is None else settings.start
        if len(start) != count:
            raise ConfigError(f"the start has {len(start)} values for {count} experts")
        Coefficients(tuple(start), self.fixed)  # those of globs are as many, and finite
        groups, shares = _groups(self.family, groups_of(names, settings.per), self.fixed)
        bounds = resolve_bounds(settings.bounds, count)
        return Space(
            experts=self.experts,
            bounds=tuple(self.listed("bounds", bounds) if settings.bounds else bounds),
            start=tuple(self.listed("start", start) if settings.start else start),
            groups=tuple(groups),
            has_rest=shares[-1] > 0,
            fixed=self.fixed,
            shares=tuple(shares if shares[-1] > 0 else shares[:-1]),
        )


def _groups(
    family: Family, globs: Sequence[str], fixed: Mapping[str, Any]
) -> tuple[list[str], list[float]]:
    """The globs that decide for any tensor, and how many parameters each decides, the rest last."""
    from fnmatch import fnmatchcase

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


def find_measure(run: RunFile, order: Order, pipeline: str | None) -> Measure:
    """What candidates and rows are measured with, looked for before torch is loaded."""
    from deme_cli.data.places import find_place
    from deme_cli.evaluation.references import find_reference
    from deme_cli.evaluation.weights import choose_features, find_weights
    from deme_cli.merging.search.measure import Measure
    from deme_cli.training.plan import require_companions

    settings, images = order.settings, run.settings(DataConfig)
    source = images.source or _shared_source(order.family)
    if not source:
        raise ConfigError("no images to search with: set [data] source in deme.toml")
    evaluation = run.settings(EvalConfig)
    features = choose_features(evaluation.features, [source])
    find_place(source)
    measures = searches(settings) or order.reports  # else the images alone are needed
    distances = [rung for rung in order.rungs if rung.is_distance and measures]
    if distances:
        if min(rung.num for rung in distances) < 2:
            raise ConfigError("num = 1: a distance needs at least 2 images per candidate")
        weights = find_weights(features, evaluation.resize)
        for rung in distances:
            find_reference(
                source, features, evaluation.resize, weights=weights, split="train",
                kernel=rung.name == "kid",
            )  # fmt: skip
    _warn_of_seeds(settings, evaluation, order)
    named = evaluation.kid if order.rungs[-1].name == "kid" else evaluation.fid
    report_reference = run.seen(named) if named and named != source else None
    if order.reports and order.rungs[-1].is_distance:
        _find_report_reference(order, source, report_reference, features, evaluation)
    sample = run.settings(SampleConfig)
    if sample.prompts:
        sample = replace(sample, prompts=run.seen(sample.prompts))
    pipeline = run.pipeline(pipeline)
    require_companions(order.family.base_record, pipeline)
    return Measure(
        replace(images, source=source), features, evaluation.resize, sample, pipeline,
        run.settings(FinetuneConfig).cache, order.device, order.dtype,
        order.family.base.path.parent,
        report_reference,
    )  # fmt: skip


def _find_report_reference(
    order: Order, source: str, other: str | None, features: str, evaluation: EvalConfig
) -> None:
    """Look for what the report takes distances to; warn where the search has seen all of it."""
    from deme_cli.evaluation.references import find_reference
    from deme_cli.evaluation.weights import find_weights

    distance = order.rungs[-1].name
    weights, kernel = find_weights(features, evaluation.resize), distance == "kid"
    searched, reported = (
        find_reference(
            place, features, evaluation.resize, weights=weights, kernel=kernel, split=split
        )
        for place, split in ((source, "train"), (other or source, None if other else "test"))
    )
    if searched == reported and searches(order.settings):
        console.warn(
            f"{source}: one reference ({reported.kind}) serves the search and its report, which "
            f"then differ in their seeds alone; name another one in [eval] {distance}"
        )


def _warn_of_seeds(settings: MergeConfig, evaluation: EvalConfig, order: Order) -> None:
    """A seed that chooses must not be one that reports."""
    if evaluation.seed <= settings.seed < evaluation.seed + evaluation.repeats:
        console.warn(f"seed {settings.seed} is one that `deme eval` reports with; use another")
    stop = settings.report_seed + settings.report_repeats
    if order.reports and settings.report_seed <= settings.seed < stop:
        raise ConfigError(
            f"seed {settings.seed} chooses the coefficients and would report them as well; "
            f"set another report_seed in [merge] of deme.toml"
        )


def _shared_source(family: Family) -> str | None:
    """The images that all the experts were trained on, if these are the same."""
    sources = {parent.record.data.get("source") for parent in family.parents}
    return sources.pop() if len(sources) == 1 else None
