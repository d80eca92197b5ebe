"""What a merge is asked for, checked before torch is loaded: whose coefficients, how, and by what.

Settings whose values are one for each expert are brought into the order of the experts here and
nowhere else: lists of a deme.toml are in the order of the ranges, lists that were given in the
order of the experts. What a search and a report are measured by is looked for here as well, all of
it, before the first candidate. No torch.
N experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deme_cli import console
from deme_cli.config import DataConfig, EvalConfig, FromFile, MergeConfig, SampleConfig
from deme_cli.data.image_source import find_image_source
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.evaluation.references import (
    Reference,
    choose_features,
    find_reference,
    find_weights,
)
from deme_cli.files import cast_specs, require_output, require_space
from deme_cli.merging.coefficients import (
    Coefficients,
    Grid,
    Space,
    groups_of,
    require_matches,
    resolve_bounds,
    resolve_grid,
)
from deme_cli.merging.inputs import Inputs, find_base, open_experts, open_inputs
from deme_cli.merging.methods import MethodSettings, fit_coefficients
from deme_cli.merging.power_ema import coefficients_for_length
from deme_cli.merging.search import Search, Stage, open_search, parse_stages
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, parse_span, require_cover
from deme_cli.training.setup import require_companions

SEARCH, REPORT = 0, 1  # the part of the held-out images, and which reference
CLOSED_FORMS = ("slerp", "model-stock")  # nothing to search for
_TIME = re.compile(r"([0-9.]+)\s*([smh]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class MergePlan:
    """A merge as it was asked for; `fixed` are coefficients given for globs of tensors."""

    run: RunFile
    inputs: Inputs
    settings: MergeConfig
    output: Path
    fixed: Mapping[str, tuple[float, ...]]
    ema_length: float | None = None
    pipeline: str | None = None  # folder or hub id of the frozen parts
    device: str = "cpu"
    dtype: str = "fp32"
    save_dtype: str | None = None  # of the merged weights; None for that of the base
    force: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the merged weights."""
        return sum(
            s.num_bytes for s in cast_specs(self.inputs.base.tensors.values(), self.save_dtype)
        )

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
        paths = [str(expert.path) for expert in self.inputs.experts]
        stems = [expert.path.stem for expert in self.inputs.experts]
        return tuple(next(n for n in (labels, stems, paths) if len(set(n)) == len(n)))

    def in_order(self, setting: str, values: Sequence[Any]) -> list[Any]:
        """Values of a setting, one for each expert, in the order of the experts."""
        if len(values) != (count := len(self.inputs.experts)):
            raise ConfigError(
                f"{setting}: {len(values)} values for {count} experts; give one for each"
            )
        if not isinstance(getattr(self.settings, setting), FromFile):
            return list(values)
        placed = dict(zip(self.inputs.by_range, values, strict=True))
        return [placed[index] for index in range(len(values))]

    @property
    def grid(self) -> Grid | None:
        """The values tried for each expert, if the search is a grid."""
        if self.settings.search != "grid":
            return None
        return tuple(
            self.in_order("grid", resolve_grid(self.settings.grid, len(self.inputs.experts)))
        )

    @property
    def coefficients(self) -> Coefficients | None:
        """Those given, with those of globs, or those of an EMA length; None for none."""
        values, experts = self.settings.coefficients, self.inputs.experts
        if self.ema_length is not None:
            records = [expert.record for expert in experts]
            return Coefficients(tuple(coefficients_for_length(records, self.ema_length)))
        if values is None and not self.fixed:
            return None
        if values is None:
            values = [1 / len(experts)] * len(experts)
        return Coefficients(tuple(map(float, self.in_order("coefficients", values))), self.fixed)

    @property
    def space(self) -> Space:
        """What a search varies. Raises ConfigError on bounds, start or globs that do not fit."""
        settings, count = self.settings, len(self.inputs.experts)
        names = [spec.name for spec in self.inputs.specs]
        require_matches(list(self.fixed), names)
        start = [1 / count] * count if settings.start is None else settings.start
        start = self.in_order("start", start)
        Coefficients(tuple(start), self.fixed)  # those of globs are as many, and finite
        globs = [*self.fixed, *groups_of(names, settings.per)]
        used = {next((g for g in globs if fnmatchcase(name, g)), None) for name in names}
        return Space(
            experts=self.expert_names,
            bounds=tuple(self.in_order("bounds", resolve_bounds(settings.bounds, count))),
            start=tuple(start),
            groups=tuple(glob for glob in globs if glob in used and glob not in self.fixed),
            has_rest=None in used,
            fixed=self.fixed,
        )

    @property
    def search(self) -> Search:
        """The search that is asked for."""
        settings = self.settings
        return open_search(
            settings.search, self.space, self.stages, grid=self.grid, seed=settings.seed,
            evaluations=settings.evaluations, with_soup=self.reports,
            seconds=math.inf if settings.time is None else parse_time(settings.time),
        )  # fmt: skip

    @property
    def images(self) -> DataConfig:
        """The run's images, or those that all experts were trained on."""
        images = self.run.settings(DataConfig)
        sources = {expert.record.data.get("source") for expert in self.inputs.experts} - {None}
        source = images.source or (sources.pop() if len(sources) == 1 else None)
        if not source:
            raise ConfigError("no images to search with: set [data] source in deme.toml")
        return replace(images, source=source)

    @property
    def features(self) -> str:
        """What distances are taken on."""
        return choose_features(self.run.settings(EvalConfig).features, [self.images.source])

    @property
    def sample(self) -> SampleConfig:
        """How images are drawn, but for what a stage says of it."""
        sample = self.run.settings(SampleConfig)
        return replace(sample, prompts=sample.prompts and self.run.seen(sample.prompts))

    def reference(self, distance: str, part: int) -> Reference:
        """What `kid` or `fid` is taken to: the training images; in a report that of [eval], or the
        test images."""
        config = self.run.settings(EvalConfig)
        source, named = self.images.source, config.kid if distance == "kid" else config.fid
        split: str | None = "train" if part == SEARCH else "test"
        if part == REPORT and named and named != source:
            source, split = self.run.seen(named), None
        return find_reference(
            source, self.features, config.resize, needs_images=distance == "kid", split=split,
            weights=find_weights(self.features, config.resize),
        )  # fmt: skip

    def describe(self, objectives: Sequence[Any]) -> dict[str, Any]:
        """Everything the trials depend on; budgets are left out."""
        settings, space, grid = self.settings, self.space, self.grid
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
            "seed": settings.seed,
            "objectives": [{**one.protocol, "dtype": self.dtype} for one in objectives],
            "keep": [stage.keep for stage in self.stages[:-1]],
        }


def open_plan(
    paths: Sequence[Path], settings: MergeConfig, *, run: RunFile, output: Path,
    force: bool = False, base: Path | None = None,
    fixed: Mapping[str, Sequence[float]] | None = None, **options: Any,
) -> MergePlan:  # fmt: skip
    """The files behind the arguments, checked to belong together and to fit the settings.

    options: the other fields of a plan.
    """
    require_output(output, force=force)
    opened = open_experts(paths, "expert", "task-vector")
    inputs = open_inputs(find_base(opened, run, base), opened)
    by_glob = {glob: tuple(values) for glob, values in (fixed or {}).items()}
    plan = MergePlan(run, inputs, settings, output, by_glob, force=force, **options)
    require_space(output, plan.num_bytes)
    for is_wrong, message in _contradictions(plan):
        if is_wrong:
            raise ConfigError(message)
    if plan.searches:
        _ = plan.search
    else:
        fit_coefficients(inputs, plan.coefficients, plan.method)
    if plan.searches or plan.reports:
        _require_measurable(plan)
    return plan


def _contradictions(plan: MergePlan) -> list[tuple[bool, str]]:
    """Settings that are each right alone: whether they go together, and what to say if not."""
    settings, first = plan.settings, plan.stages[0]
    method, search, per, seed = settings.method, settings.search, settings.per, settings.seed
    horizon = plan.inputs.base_record.num_train_timesteps
    span = parse_span(settings.loss_range or f"0:{horizon}", "loss_range")
    has_own = settings.coefficients is not None or bool(plan.fixed)
    return [
        (method in CLOSED_FORMS and plan.searches,
         f"method {method} has a closed form, there is nothing to search for; use --search none"),
        (method in CLOSED_FORMS and per != "model",
         f"--per {per} goes with methods linear, ties and dare"),
        (per != "model" and not plan.searches,
         f"--per {per} says what a search varies; add --search gradient, or name coefficients "
         f"with --coefficients-for"),
        (search == "grid" and per == "layer",
         "search grid takes too many candidates for every layer; use --search gradient or cmaes"),
        (search == "gradient" and first.is_distance,
         f"search gradient needs an objective without sampling, found {first.name!r}; use "
         f"--objective loss, experts, or stages that begin with one"),
        (span.stop > horizon,
         f"loss_range {span} reaches past the {horizon} timesteps of this model"),
        (plan.ema_length is not None and (method != "linear" or plan.searches or has_own),
         "--ema-length makes the coefficients itself, of a linear merge; leave out --method, "
         "--search, -w and --coefficients-for"),
        (plan.reports
         and settings.report_seed <= seed < settings.report_seed + settings.report_repeats,
         f"seed {seed} chooses the coefficients and would report them as well; "
         f"set another report_seed in [merge] of deme.toml"),
    ]  # fmt: skip


def _require_measurable(plan: MergePlan) -> None:
    """Look for all that candidates and rows are measured with; warn of what it is not worth.

    Raises MissingError naming what is not there.
    """
    evaluation, source = plan.run.settings(EvalConfig), plan.images.source
    find_image_source(source)
    for stage in plan.stages:
        if stage.is_distance:
            if stage.num < 2:
                raise ConfigError("num = 1: a distance needs at least 2 images per candidate")
            plan.reference(stage.name, SEARCH)
    if evaluation.seed <= plan.settings.seed < evaluation.seed + evaluation.repeats:
        console.warn(f"seed {plan.settings.seed} is one that `deme eval` reports with; use another")
    last = plan.stages[-1]
    if plan.reports and last.is_distance:
        searched, reported = (plan.reference(last.name, part) for part in (SEARCH, REPORT))
        if searched == reported and plan.searches:
            console.warn(
                f"{source}: one reference ({reported.kind}) serves the search and its report, "
                f"which then differ in their seeds alone; name another one in [eval] {last.name}"
            )
    require_companions(plan.inputs.base_record, plan.pipeline)


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


def ensemble_of(inputs: Inputs) -> list[int] | None:
    """Numbers of the experts that make the ensemble, in the order of their ranges, the first of
    each; None where these do not cover [0, T) once."""
    first: dict[TimestepRange, int] = {}
    for index in inputs.by_range:
        first.setdefault(inputs.experts[index].record.timesteps, index)
    try:
        require_cover(list(first), inputs.base_record.num_train_timesteps)
    except ArtifactError:
        return None
    return list(first.values())
