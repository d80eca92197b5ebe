"""`deme analyze landscape`: the loss around a model, over the plane of others, along a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.analysis.config import LandscapeConfig
from deme_cli.analysis.landscape.choices import choose_along, choose_ranges
from deme_cli.api.caching import fill_with_bar
from deme_cli.commands.analysis import (
    Data,
    Output,
    Split,
    check_images,
    check_output,
    own_base,
    watch,
    write_analysis,
)
from deme_cli.commands.launching import meet
from deme_cli.commands.options import (
    ConfigPath,
    Device,
    DryRun,
    Force,
    Json,
    Pipeline,
    Quiet,
    begin,
    option,
)
from deme_cli.config import FinetuneConfig, SplitConfig
from deme_cli.errors import ConfigError
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange

_C = LandscapeConfig


def landscape(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help=r"The origin, then the models that make the line or the plane \[default: the "
            "base of deme.toml].",
            show_default=False,
        ),
    ] = None,
    along: Annotated[str | None, option(_C, "along", "--along")] = None,
    mark: Annotated[
        list[str] | None,
        typer.Option("--mark", help="A model to show where it lies on the plane; repeatable."),
    ] = None,
    points: Annotated[int, option(_C, "points", "--points")] = _C.points,
    span: Annotated[float | None, option(_C, "span", "--span")] = None,
    data: Data = None,
    split: Split = "train",
    num: Annotated[int, option(_C, "num", "--num")] = _C.num,
    report_num: Annotated[int, option(_C, "report_num", "--report-num")] = _C.report_num,
    n: Annotated[
        int | None,
        typer.Option(
            "-n", "--num-ranges", show_default=False,
            help="Equal ranges that are told apart; unset: those of the split or the experts.",
        ),
    ] = None,
    batch_size: Annotated[int, option(_C, "batch_size", "--batch-size", "-b")] = _C.batch_size,
    jobs: Annotated[int, option(_C, "jobs", "--jobs", "-j")] = _C.jobs,
    seed: Annotated[int, option(_C, "seed", "--seed")] = _C.seed,
    output: Output = Path("landscape.json"),
    pipeline: Pipeline = None,
    config: ConfigPath = None,
    device: Device = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Draw the loss around a model, over a plane or along a line, of all timesteps and by range.

    Processes of one launch (torchrun, accelerate launch, srun) share the points.

    Example: deme analyze landscape base.safetensors ft_1of4.safetensors ft_4of4.safetensors
    """
    console.set_quiet(quiet)
    world = meet(device)
    run = begin(config, quiet=quiet)
    settings = LandscapeConfig(
        along=along, points=points, span=span, num=num, report_num=report_num,
        batch_size=batch_size, jobs=jobs, seed=seed,
    )  # fmt: skip
    if jobs > 1 and not world.is_alone:
        raise ConfigError(
            f"--jobs {jobs} starts processes of its own; the {world.size} of this launch share the "
            f"points: leave it out"
        )
    check_output(output, force=force)
    spanning, marks = models or [own_base(run)], mark or []
    settings = replace(settings, along=choose_along(along, len(spanning)))
    arguments = [*spanning, *marks]
    if marks and settings.along in ("random", "line"):
        raise ConfigError(
            f"--mark: models are marked on the plane of models (--along vectors or pca), not on "
            f"{settings.along}"
        )
    from deme_cli.diffusion.locate import locate_model, peek_timesteps

    known = [peek_timesteps(locate_model(argument)) for argument in arguments]
    ranges = _ranges(run, arguments, n, known[0]) if known[0] else None
    images = check_images(run, data)
    count = points if settings.along == "line" else points**2
    spans = f"each of {', '.join(map(str, ranges))}" if ranges else "each range"
    console.note(
        f"{settings.along}, {', '.join(arguments)}: {count:,} points of {num:,} draws from "
        f"{images.source} ({split}), for all timesteps and {spans}"
    )
    if dry_run:
        console.result_paths([], as_json=as_json, dry_run=True)
        return

    from deme_cli.analysis.landscape.directions import basis_of
    from deme_cli.analysis.landscape.field import Field, Setup
    from deme_cli.analysis.landscape.launch import help_landscape
    from deme_cli.analysis.landscape.measure import (
        LandscapeAnalysis,
        measure_landscape,
        total_points,
    )
    from deme_cli.analysis.landscape.picture import draw_landscape
    from deme_cli.analysis.landscape.reading import (
        axis_labels,
        landscape_document,
        place_of,
        read_landscape,
    )
    from deme_cli.analysis.landscape.subspace import has_any_projections, open_models
    from deme_cli.diffusion.denoiser import choose_device
    from deme_cli.diffusion.schedule import read_schedule

    opened = open_models(arguments)
    basis = basis_of(str(settings.along), opened, len(spanning))
    origin = Path(spanning[0])
    setup = Setup(
        tuple(arguments), has_any_projections(opened), None if basis is None else basis.mixing,
        settings, images, split, cache=run.settings(FinetuneConfig).cache,
        beside=origin.parent if origin.is_file() else output.parent,
        pipeline=run.pipeline(pipeline), device=str(choose_device(world.device or device)),
    )  # fmt: skip
    record, examples = setup.open_examples(opened[0].record)
    fill_with_bar(examples, world=world)
    ranges = ranges or _ranges(run, arguments, n, record.num_train_timesteps)
    schedule = read_schedule(record.scheduler_config, spanning[0])
    opened[0] = replace(opened[0], record=record)
    analysis = LandscapeAnalysis(opened, setup, basis, schedule, examples, ranges, output)
    world.require_same({**analysis.identity, "output": str(output)})
    world.wait()  # nothing is begun before all agree
    if not world.is_first:
        help_landscape(Field(setup, examples), world)
        return
    steps = measure_landscape(analysis, force=force, world=world)
    found = watch(steps, "landscape", total_points(analysis), "point")
    reading = read_landscape(found, len(spanning))
    labels = axis_labels(analysis)
    drawn = draw_landscape(
        found, labels, title=f"Denoising loss {place_of(found, len(spanning))}",
        foot=f"{examples.source} ({split}), {num:,} draws, the same at all {count:,} points; "
        f"numbers: {report_num:,} fresh draws, ± 95 % over images; seed {seed}",
    )  # fmt: skip
    document, rows = landscape_document(analysis, found, reading, labels), found.rows()
    shown = {
        name: rows[name] for name in ("origin", "lowest", "barriers", "models") if name in rows
    }
    paths = write_analysis(output, drawn, document, reading)
    console.result_paths(paths, as_json=as_json, reading=reading, **shown)


def _ranges(
    run: RunFile, arguments: Sequence[str], n: int | None, num_train_timesteps: int
) -> list[TimestepRange]:
    """The ranges that are told apart, from headers and deme.toml."""
    from deme_cli.evaluation.row_plans import record_of_file
    from deme_cli.records import ExpertRecord

    records = [record_of_file(argument) for argument in arguments]
    own = [record.timesteps for record in records if isinstance(record, ExpertRecord)]
    settings = run.settings(SplitConfig)
    return choose_ranges(
        n, settings.timestep_ranges, own, default_n=settings.n,
        num_train_timesteps=num_train_timesteps,
    )  # fmt: skip
