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
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.config import DataConfig, EvalConfig, FromFile, MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.files import cast_specs, require_output, require_space
from deme_cli.merging.coefficients import (
    Coefficients,
    Space,
    groups_of,
    require_matches,
    resolve_bounds,
    resolve_grid,
)
from deme_cli.merging.inputs import Inputs, find_base, open_experts, open_inputs
from deme_cli.merging.methods import LINEAR, MethodSettings, fit_coefficients
from deme_cli.merging.power_ema import coefficients_for_length
from deme_cli.merging.search import Search, Stage, parse_stages
from deme_cli.run_file import RunFile
from deme_cli.timesteps import parse_span

if TYPE_CHECKING:
    from deme_cli.evaluation.references import Reference

SEARCH, REPORT = 0, 1  # the part of the held-out images, and which reference
_TIME = re.compile(r"(\d+\.?\d*|\.\d+)\s*([smh]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class MergePlan:
    """A merge as it was asked for.

    names: of the experts: 1of4, or that of its file where two would have the same.   reports:
    whether the merged model is measured beside others.   given: its coefficients, None where a
    search or the method finds them, or for 1/N each.   pipeline: folder or hub id of the frozen
    parts.   save_dtype, num_bytes: of the merged weights; None for the dtype of the base.
    """

    run: RunFile
    inputs: Inputs
    settings: MergeConfig
    output: Path
    num_bytes: int = 0
    method: MethodSettings = LINEAR
    stages: Sequence[Stage] = ()
    names: Sequence[str] = ()
    reports: bool = False
    given: Coefficients | None = None
    search: Search | None = None
    pipeline: str | None = None
    device: str = "cpu"
    dtype: str = "fp32"
    save_dtype: str | None = None
    force: bool = False

    @cached_property
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
        from deme_cli.evaluation.references import choose_features

        return choose_features(self.run.settings(EvalConfig).features, [self.images.source])

    def reference(self, distance: str, part: int) -> Reference:
        """What `kid` or `fid` is taken to: the training images; in a report that of [eval], or the
        test images."""
        from deme_cli.evaluation.references import find_reference, find_weights

        config = self.run.settings(EvalConfig)
        source, named = self.images.source, config.kid if distance == "kid" else config.fid
        split: str | None = "train" if part == SEARCH else "test"
        if part == REPORT and named and named != source:
            source, split = self.run.seen(named), None
        return find_reference(
            source, self.features, config.resize, needs_images=distance == "kid", split=split,
            weights=find_weights(self.features, config.resize),
        )  # fmt: skip


def open_plan(
    paths: Sequence[Path], settings: MergeConfig, *, run: RunFile, output: Path,
    force: bool = False, base: Path | None = None, ema_length: float | None = None,
    fixed: Mapping[str, Sequence[float]] | None = None, pipeline: str | None = None,
    device: str = "cpu", dtype: str = "fp32", save_dtype: str | None = None,
) -> MergePlan:  # fmt: skip
    """The files behind the arguments, checked to belong together and to fit the settings.

    fixed: coefficients given for globs of tensors.
    """
    require_output(output, force=force, inputs=paths)
    experts = open_experts(paths, "expert", "task-vector")
    inputs = open_inputs(find_base(experts, run, base), experts)
    require_output(output, force=force, inputs=[inputs.base.path])
    if not settings.lora and len({expert.holds_adapters for expert in experts}) > 1:
        console.note("some experts hold adapters, others whole weights: merged as whole weights")
    written = [header.tensors.values() for header in inputs.headers]
    specs = cast_specs(chain(*written[1:]) if settings.lora else written[0], save_dtype)
    require_space(output, num_bytes := sum(spec.num_bytes for spec in specs))
    labels = [[expert.record.label for expert in experts], [path.stem for path in paths]]
    searches = settings.search != "none"
    plan = MergePlan(
        run, inputs, settings, output, num_bytes,
        LINEAR if settings.method == "linear" else MethodSettings(
            settings.method, settings.density, settings.trim, settings.mask_seed
        ),
        parse_stages(settings.objective, num=settings.num),
        next((names for names in labels if len(set(names)) == len(names)), list(map(str, paths))),
        searches if settings.report is None else settings.report,
        pipeline=pipeline, device=device, dtype=dtype, save_dtype=save_dtype, force=force,
    )  # fmt: skip
    by_glob = {glob: tuple(values) for glob, values in (fixed or {}).items()}
    has_own = settings.coefficients is not None or bool(by_glob)
    for is_wrong, message in _contradictions(plan, ema_length, has_own):
        if is_wrong:
            raise ConfigError(message)
    if searches:
        plan = replace(plan, search=_open_search(plan, by_glob))
    else:
        given = None
        if ema_length is not None:
            records = [expert.record for expert in experts]
            given = Coefficients(tuple(coefficients_for_length(records, ema_length)))
        elif has_own:
            values = settings.coefficients
            values = [1 / len(experts)] * len(experts) if values is None else values
            in_order = _in_order(plan, "coefficients", values)
            given = Coefficients(tuple(map(float, in_order)), by_glob)
        fit_coefficients(inputs, given, plan.method)
        plan = replace(plan, given=given)
    if searches or plan.reports:
        _require_measurable(plan)
    return plan


def _in_order(plan: MergePlan, setting: str, values: Sequence[Any]) -> list[Any]:
    """Values of a setting, one for each expert, in the order of the experts."""
    if len(values) != (count := len(plan.names)):
        raise ConfigError(f"{setting}: {len(values)} values for {count} experts; give one for each")
    if not isinstance(getattr(plan.settings, setting), FromFile):
        return list(values)
    placed = dict(zip(plan.inputs.by_range, values, strict=True))
    return [placed[index] for index in range(count)]


def _open_search(plan: MergePlan, fixed: Mapping[str, tuple[float, ...]]) -> Search:
    """Raises ConfigError on bounds, start, grid or globs that do not fit."""
    settings, count = plan.settings, len(plan.names)
    tensors = [spec.name for spec in plan.inputs.specs]
    require_matches(list(fixed), tensors)
    start = [1 / count] * count if settings.start is None else settings.start
    start = _in_order(plan, "start", start)
    Coefficients(tuple(start), fixed)  # those of globs are as many, and finite
    globs = [*fixed, *groups_of(tensors, settings.per)]
    used = {next((g for g in globs if fnmatchcase(name, g)), None) for name in tensors}
    space = Space(
        experts=tuple(plan.names),
        bounds=tuple(_in_order(plan, "bounds", resolve_bounds(settings.bounds, count))),
        start=tuple(start),
        groups=tuple(glob for glob in globs if glob in used and glob not in fixed),
        has_rest=None in used,
        fixed=fixed,
    )
    grid = None
    if settings.search == "grid":
        grid = tuple(_in_order(plan, "grid", resolve_grid(settings.grid, count)))
    return Search(
        settings.search, space, plan.stages, grid=grid, seed=settings.seed,
        evaluations=settings.evaluations, with_soup=plan.reports,
        seconds=math.inf if settings.time is None else parse_time(settings.time),
    )  # fmt: skip


def _contradictions(
    plan: MergePlan, ema_length: float | None, has_own: bool
) -> list[tuple[bool, str]]:
    """Settings that are each right alone: whether they go together, and what to say if not."""
    settings, first = plan.settings, plan.stages[0]
    method, search, per, seed = settings.method, settings.search, settings.per, settings.seed
    searches, is_closed = search != "none", method in ("slerp", "model-stock")
    horizon = plan.inputs.base_record.num_train_timesteps
    span = parse_span(settings.loss_range or f"0:{horizon}", "loss_range")
    whole = next((one.path for one in plan.inputs.experts if not one.holds_adapters), None)
    instead = "leave out --lora, and write the merge as a LoRA with `deme export --lora`"
    return [
        (settings.lora is not None and method != "linear",
         f"--lora stacks the factors of a linear merge, and what {method} makes has none; "
         f"{instead}"),
        (settings.lora is not None and whole is not None,
         f"{whole}: holds no adapters, whose factors --lora stacks; {instead}"),
        (is_closed and searches,
         f"method {method} has a closed form, there is nothing to search for; use --search none"),
        (is_closed and per != "model", f"--per {per} goes with methods linear, ties and dare"),
        (per != "model" and not searches,
         f"--per {per} says what a search varies; add --search gradient, or name coefficients "
         f"with --coefficients-for"),
        (search == "grid" and per == "layer",
         "search grid takes too many candidates for every layer; use --search gradient or cmaes"),
        (search == "gradient" and first.is_distance,
         f"search gradient needs an objective without sampling, found {first.name!r}; use "
         f"--objective loss, experts, or stages that begin with one"),
        (span.stop > horizon,
         f"loss_range {span} reaches past the {horizon} timesteps of this model"),
        (ema_length is not None and (method != "linear" or searches or has_own),
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
    from deme_cli.data.image_source import find_image_source
    from deme_cli.training.setup import require_companions

    evaluation, seed, source = plan.run.settings(EvalConfig), plan.settings.seed, plan.images.source
    find_image_source(source)
    for stage in plan.stages:
        if stage.is_distance:
            if stage.num < 2:
                raise ConfigError("num = 1: a distance needs at least 2 images per candidate")
            searched = plan.reference(stage.name, SEARCH)
    if evaluation.seed <= seed < evaluation.seed + evaluation.repeats:
        console.warn(f"seed {seed} is one that `deme eval` reports with; use another")
    if plan.reports and stage.is_distance:  # the last
        reported = plan.reference(stage.name, REPORT)
        if searched == reported and plan.search:
            console.warn(
                f"{source}: one reference ({reported.kind}) serves the search and its report, "
                f"which then differ in their seeds alone; name another one in [eval] {stage.name}"
            )
    require_companions(plan.inputs.base_record, plan.pipeline)


def parse_time(text: str) -> float:
    """`90s`, `30m`, `2h` or seconds, as seconds. Raises ConfigError."""
    match = _TIME.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not seconds > 0:
        raise ConfigError(f"time {text!r}: expected a duration, as 90s, 30m or 2h")
    return seconds
