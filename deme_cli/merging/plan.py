"""What a merge is asked for, checked before torch is loaded: whose coefficients, how, and by what.

Settings whose values are one for each expert are brought into the order of the experts here and
nowhere else: lists of a deme.toml are in the order of the ranges, lists that were given in the
order of the experts. No torch.
N experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deme_cli import console
from deme_cli.config import (
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    FromFile,
    MergeConfig,
    SampleConfig,
)
from deme_cli.data.image_source import find_image_source
from deme_cli.errors import ConfigError
from deme_cli.evaluation.references import choose_features, find_reference, find_weights
from deme_cli.files import require_output, require_space
from deme_cli.merging.coefficients import Coefficients, groups_of, require_matches
from deme_cli.merging.inputs import Inputs, find_base, open_experts, open_inputs
from deme_cli.merging.methods import MethodSettings, fit_coefficients
from deme_cli.merging.power_ema import coefficients_for_length
from deme_cli.merging.search import Search, open_search
from deme_cli.merging.space import Grid, Space, resolve_bounds, resolve_grid
from deme_cli.merging.successive_halving import Stage, parse_stages
from deme_cli.run_file import RunFile
from deme_cli.training.setup import require_companions

CLOSED_FORMS = ("slerp", "model-stock")  # nothing to search for
_TIME = re.compile(r"([0-9.]+)\s*([smh]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class MergePlan:
    """A merge as it was asked for; `fixed` are coefficients given for globs of tensors."""

    run: RunFile
    inputs: Inputs
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
    def stages(self) -> list[Stage]:
        return parse_stages(self.settings.objective, num=self.settings.num)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """A name for each expert: 1of4, or its file's where two would have the same."""
        labels = [expert.record.label for expert in self.inputs.experts]
        stems = [expert.path.stem for expert in self.inputs.experts]
        names = labels if len(set(labels)) == len(labels) else stems
        if len(set(names)) < len(names):
            names = [f"{name} ({index})" for index, name in enumerate(names, start=1)]
        return tuple(names)

    def in_order(self, setting: str, values: Sequence[Any]) -> list[Any]:
        """Values of a setting, one for each expert, in the order of the experts."""
        if not isinstance(getattr(self.settings, setting), FromFile):
            return list(values)
        placed = dict(zip(self.inputs.by_range, values, strict=True))
        return [placed[index] for index in range(len(values))]

    def grid(self) -> Grid | None:
        """The values tried for each expert, if the search is a grid."""
        if self.settings.search != "grid":
            return None
        grid = resolve_grid(self.settings.grid, len(self.inputs.experts))
        return tuple(self.in_order("grid", grid))

    def coefficients(self) -> Coefficients | None:
        """Those given, with those of globs, or those of an EMA length; None for none."""
        values, count = self.settings.coefficients, len(self.inputs.experts)
        if self.ema_length is not None:
            records = [expert.record for expert in self.inputs.experts]
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
        settings, count = self.settings, len(self.inputs.experts)
        names = [spec.name for spec in self.inputs.specs]
        require_matches(list(self.fixed), names)
        start = [1 / count] * count if settings.start is None else settings.start
        if len(start) != count:
            raise ConfigError(f"the start has {len(start)} values for {count} experts")
        Coefficients(tuple(start), self.fixed)  # those of globs are as many, and finite
        groups, shares = _groups(self.inputs, groups_of(names, settings.per), self.fixed)
        return Space(
            experts=self.expert_names,
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
            settings.search, self.space(), self.stages, grid=self.grid(), seed=settings.seed,
            evaluations=settings.evaluations, with_soup=self.reports,
            seconds=None if settings.time is None else parse_time(settings.time),
        )  # fmt: skip

    def describe(self, objectives: Sequence[Any]) -> dict[str, Any]:
        """Everything the trials depend on; budgets are left out where they can be changed."""
        settings, space, grid = self.settings, self.space(), self.grid()
        return {
            "method": settings.search,
            "parents": [expert.record.fingerprint for expert in self.inputs.experts],
            "base": self.inputs.base_record.fingerprint,
            "combination": {"name": self.method.name, **self.method.used},
            "groups": list(space.all_groups),
            "fixed": {glob: list(w) for glob, w in space.fixed.items()},
            "grid": grid,
            "bounds": None if grid else space.bounds,
            "start": list(space.start),
            "evaluations": settings.evaluations if space.groups else None,
            "seed": settings.seed,
            "objectives": [{**one.protocol, "dtype": self.dtype} for one in objectives],
            "keep": [stage.keep for stage in self.stages[:-1]],
        }


def plan_request(
    paths: Sequence[Path], settings: MergeConfig, *, fixed: Mapping[str, Sequence[float]],
    ema_length: float | None, base: Path | None, output: Path, run: RunFile, pipeline: str | None,
    device: str, dtype: str, force: bool,
) -> MergePlan:  # fmt: skip
    """The files behind the arguments, checked to belong together and to fit the settings."""
    _require_sense(settings)
    require_output(output, force=force)
    opened = open_experts(paths, "expert", "task-vector")
    inputs = open_inputs(find_base(opened, run, base), opened)
    require_space(output, sum(spec.num_bytes for spec in inputs.base.tensors.values()))
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
    plan = MergePlan(
        run, inputs, settings, by_glob, output, device, dtype, pipeline, force, ema_length
    )
    if plan.searches:
        plan.search()
    else:
        fit_coefficients(inputs, plan.coefficients(), plan.method)
    return plan


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
    first = parse_stages(settings.objective, num=settings.num)[0]
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
    inputs: Inputs, globs: Sequence[str], fixed: Mapping[str, Any]
) -> tuple[list[str], list[float]]:
    """The globs that decide for any tensor, and how many parameters each decides, the rest last."""
    counts = dict.fromkeys([*fixed, *globs], 0)
    rest = 0
    for spec in inputs.specs:
        owner = next((glob for glob in counts if fnmatchcase(spec.name, glob)), None)
        if owner is None:
            rest += spec.num_elements
        else:
            counts[owner] += spec.num_elements
    used = [glob for glob in globs if counts[glob] and glob not in fixed]
    return used, [float(counts[glob]) for glob in used] + [float(rest)]


@dataclass(frozen=True)
class Measure:
    """What candidates are measured with: the run's images; for distances features and sampling.

    `pipeline` and `cache` are where frozen parts and their latents are, for models that have any;
    `auto` puts the cache beside the base, in `beside`. `report_reference` is what the report takes
    distances to; None takes the held-out images.
    """

    images: DataConfig
    features: str
    resize: str
    sample: SampleConfig
    pipeline: str | None = None
    cache: str = "off"
    device: str = "cpu"
    dtype: str = "fp32"
    beside: Path = Path(".")
    report_reference: str | None = None

    @property
    def source(self) -> str:
        return self.images.source


def find_measure(plan: MergePlan) -> Measure:
    """What candidates and rows are measured with, looked for before torch is loaded."""
    run, settings = plan.run, plan.settings
    images = run.settings(DataConfig)
    source = images.source or _shared_source(plan.inputs)
    if not source:
        raise ConfigError("no images to search with: set [data] source in deme.toml")
    evaluation = run.settings(EvalConfig)
    features = choose_features(evaluation.features, [source])
    find_image_source(source)
    distances = [stage for stage in plan.stages if stage.is_distance]
    if distances:
        if min(stage.num for stage in distances) < 2:
            raise ConfigError("num = 1: a distance needs at least 2 images per candidate")
        weights = find_weights(features, evaluation.resize)
        for stage in distances:
            find_reference(
                source, features, evaluation.resize, weights=weights, split="train",
                kernel=stage.name == "kid",
            )  # fmt: skip
    _warn_of_seeds(settings, evaluation, plan)
    named = evaluation.kid if plan.stages[-1].name == "kid" else evaluation.fid
    report_reference = run.seen(named) if named and named != source else None
    if plan.reports and plan.stages[-1].is_distance:
        _find_report_reference(plan, source, report_reference, features, evaluation)
    sample = run.settings(SampleConfig)
    if sample.prompts:
        sample = replace(sample, prompts=run.seen(sample.prompts))
    pipeline = run.pipeline(plan.pipeline)
    require_companions(plan.inputs.base_record, pipeline)
    return Measure(
        replace(images, source=source), features, evaluation.resize, sample, pipeline,
        run.settings(FinetuneConfig).cache, plan.device, plan.dtype,
        plan.inputs.base.path.parent,
        report_reference,
    )  # fmt: skip


def _find_report_reference(
    plan: MergePlan, source: str, other: str | None, features: str, evaluation: EvalConfig
) -> None:
    """Look for what the report takes distances to; warn where the search has seen all of it."""
    distance = plan.stages[-1].name
    weights, kernel = find_weights(features, evaluation.resize), distance == "kid"
    searched, reported = (
        find_reference(
            place, features, evaluation.resize, weights=weights, kernel=kernel, split=split
        )
        for place, split in ((source, "train"), (other or source, None if other else "test"))
    )
    if searched == reported and plan.searches:
        console.warn(
            f"{source}: one reference ({reported.kind}) serves the search and its report, which "
            f"then differ in their seeds alone; name another one in [eval] {distance}"
        )


def _warn_of_seeds(settings: MergeConfig, evaluation: EvalConfig, plan: MergePlan) -> None:
    """A seed that chooses must not be one that reports."""
    if evaluation.seed <= settings.seed < evaluation.seed + evaluation.repeats:
        console.warn(f"seed {settings.seed} is one that `deme eval` reports with; use another")
    stop = settings.report_seed + settings.report_repeats
    if plan.reports and settings.report_seed <= settings.seed < stop:
        raise ConfigError(
            f"seed {settings.seed} chooses the coefficients and would report them as well; "
            f"set another report_seed in [merge] of deme.toml"
        )


def _shared_source(inputs: Inputs) -> str | None:
    """The images that all the experts were trained on, if these are the same."""
    sources = {expert.record.data.get("source") for expert in inputs.experts}
    return sources.pop() if len(sources) == 1 else None
