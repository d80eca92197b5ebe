"""`analyze_landscape`: the loss around a model, over the plane of others, along a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.analysis_config import LandscapeConfig
from deme_cli.api import analyzing
from deme_cli.api.caching import fill_with_bar
from deme_cli.config import DataConfig, FinetuneConfig, SplitConfig
from deme_cli.errors import ConfigError
from deme_cli.processes import ALONE, World
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange

if TYPE_CHECKING:
    from deme_cli.analysis.landscape.measure import LandscapeAnalysis


def analyze_landscape(
    models: Sequence[str | Path] = (),
    settings: LandscapeConfig | None = None,
    *,
    marks: Sequence[str | Path] = (),
    images: DataConfig | None = None,
    split: str = "train",
    num_ranges: int | None = None,
    output: Path = Path("landscape.json"),
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    force: bool = False, dry_run: bool = False, world: World = ALONE,
) -> analyzing.Analysis:  # fmt: skip
    """Measure the loss on a plane or a line of weights, of all timesteps and by range.

    models: the origin, then those that make the line or the plane; the base of `run` if none.
    marks: models to show where they lie on the plane.   num_ranges: equal ranges to tell apart;
    None for those of `run` or of the experts.   world: the processes that share the points, of
    which the first has the result.

    The rest is as for `analyze_losses`.
    """
    run, settings = run or RunFile(), settings or LandscapeConfig()
    analyzing.check_output(output, force=force)
    spanning = [str(model) for model in models] or [analyzing.own_base(run)]
    arguments = [*spanning, *map(str, marks)]
    settings = _check_settings(settings, len(spanning), has_marks=bool(marks), world=world)
    ranges = _check_models(run, arguments, num_ranges)
    images = analyzing.check_images(images, run, split=split)
    count = settings.points if settings.along == "line" else settings.points**2
    spans = f"each of {', '.join(map(str, ranges))}" if ranges else "each range"
    console.note(
        f"{settings.along}, {', '.join(arguments)}: {count:,} points of {settings.num:,} draws "
        f"from {images.source} ({split}), for all timesteps and {spans}"
    )
    if dry_run:
        return analyzing.nothing_written(output, dry_run=True)

    from deme_cli.analysis.landscape.directions import basis_of
    from deme_cli.analysis.landscape.field import Setup
    from deme_cli.analysis.landscape.measure import LandscapeAnalysis
    from deme_cli.analysis.landscape.subspace import has_any_projections, open_models
    from deme_cli.diffusion.denoiser import choose_device
    from deme_cli.diffusion.schedule import read_schedule

    opened = open_models(arguments)
    basis = basis_of(str(settings.along), opened, len(spanning))
    setup = Setup(
        tuple(arguments), has_any_projections(opened), None if basis is None else basis.mixing,
        settings, images, split, cache=run.settings(FinetuneConfig).cache,
        beside=analyzing.cache_folder(spanning[0], output), pipeline=run.pipeline(pipeline),
        device=str(choose_device(world.device or device)),
    )  # fmt: skip
    record, examples = setup.open_examples(opened[0].record)
    fill_with_bar(examples, world=world)
    ranges = ranges or _ranges(run, arguments, num_ranges, record.num_train_timesteps)
    schedule = read_schedule(record.scheduler_config, spanning[0])
    opened[0] = replace(opened[0], record=record)
    analysis = LandscapeAnalysis(opened, setup, basis, schedule, examples, ranges, output)
    return _measure(analysis, force=force, world=world)


def _check_settings(
    settings: LandscapeConfig, num_spanning: int, *, has_marks: bool, world: World
) -> LandscapeConfig:
    """The settings with what they go along named; raises ConfigError on what does not fit."""
    from deme_cli.analysis.landscape.choices import choose_along

    if settings.jobs > 1 and not world.is_alone:
        raise ConfigError(
            f"--jobs {settings.jobs} starts processes of its own; the {world.size} of this launch "
            f"share the points: leave it out"
        )
    along = choose_along(settings.along, num_spanning)
    if has_marks and along in ("random", "line"):
        raise ConfigError(
            f"--mark: models are marked on the plane of models (--along vectors or pca), not on "
            f"{along}"
        )
    return replace(settings, along=along)


def _check_models(
    run: RunFile, arguments: Sequence[str], n: int | None
) -> list[TimestepRange] | None:
    """Check that the models are there; the ranges, where the origin's files tell its T."""
    from deme_cli.diffusion.locate import locate_model, peek_timesteps

    known = [peek_timesteps(locate_model(argument)) for argument in arguments]
    return _ranges(run, arguments, n, known[0]) if known[0] else None


def _ranges(
    run: RunFile, arguments: Sequence[str], n: int | None, num_train_timesteps: int
) -> list[TimestepRange]:
    """The ranges that are told apart, from headers and deme.toml."""
    from deme_cli.analysis.landscape.choices import choose_ranges
    from deme_cli.evaluation.row_plans import record_of_file
    from deme_cli.records import ExpertRecord

    records = [record_of_file(argument) for argument in arguments]
    own = [record.timesteps for record in records if isinstance(record, ExpertRecord)]
    settings = run.settings(SplitConfig)
    return choose_ranges(
        n, settings.timestep_ranges, own, default_n=settings.n,
        num_train_timesteps=num_train_timesteps,
    )  # fmt: skip


def _measure(analysis: LandscapeAnalysis, *, force: bool, world: World) -> analyzing.Analysis:
    from deme_cli.analysis.landscape.field import Field
    from deme_cli.analysis.landscape.launch import help_landscape
    from deme_cli.analysis.landscape.measure import measure_landscape, total_points
    from deme_cli.analysis.landscape.picture import draw_landscape
    from deme_cli.analysis.landscape.reading import axis_labels, document_of, foot_of, place_of

    world.require_same({**analysis.identity, "output": str(analysis.output)})
    world.wait()  # nothing is begun before all agree
    if not world.is_first:
        help_landscape(Field(analysis.setup, analysis.examples), world)
        return analyzing.nothing_written(analysis.output)
    steps = measure_landscape(analysis, force=force, world=world)
    found = analyzing.watch(steps, "landscape", total_points(analysis), "point")
    title = f"Denoising loss {place_of(found, analysis.num_spanning)}"
    foot = foot_of(analysis, found)
    drawn = draw_landscape(found, axis_labels(analysis), title=title, foot=foot)
    shown = ("reading", "origin", "lowest", "barriers", "models")
    return analyzing.write_analysis(analysis.output, drawn, document_of(analysis, found), shown)
