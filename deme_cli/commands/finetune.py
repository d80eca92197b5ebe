"""`deme finetune`: train one expert, all of them, the plain control, or a base from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.commands.launching import meet
from deme_cli.commands.options import (
    Compile,
    ConfigPath,
    Device,
    DryRun,
    Dtype,
    Force,
    Given,
    Json,
    OptionsOf,
    Pipeline,
    Quiet,
    begin,
    takes_settings,
)
from deme_cli.config import DataConfig, FinetuneConfig, ModelConfig
from deme_cli.errors import ConfigError


@takes_settings
def finetune(
    range: Annotated[
        str, typer.Option("--range", help="i/N, start:stop, 1/1 (the plain control), or all.")
    ] = "",
    *,
    given: Annotated[Given, OptionsOf(FinetuneConfig)],
    of_images: Annotated[Given, OptionsOf(DataConfig)],
    base: Annotated[
        Path | None, typer.Option("--base", help=r"The base \[default: that of deme.toml].")
    ] = None,
    from_scratch: Annotated[
        Path | None,
        typer.Option(
            "--from-scratch",
            help=r"Train a base of your own: TOML or JSON with \[model] and \[scheduler].",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes for --range all.", min=1)] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Insist on continuing: fail where no run is kept.")
    ] = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Divide the network among the processes of a launch; changes rounding alone.",
            rich_help_panel="Memory",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=r"Artifact to write \[default: ft_{i}of{N}.safetensors]."
        ),
    ] = None,
    pipeline: Pipeline = None,
    config: ConfigPath = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile: Compile = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the expert of one timestep range (Eq. 3-6); run the same command again to continue.

    Processes of one launch (torchrun, accelerate launch, srun) share each batch.

    Example: deme finetune --range 2/4 --p 0.1
    """
    console.set_quiet(quiet)
    world = meet(device)
    run = begin(config, quiet=quiet)
    settings = run.settings(FinetuneConfig, **given)
    if bool(range) == bool(from_scratch):
        raise ConfigError(
            "finetune takes either --range (as in 2/4, or all) or --from-scratch FILE"
        )

    if resume and force:
        raise ConfigError("--resume continues a kept run, --force starts anew; give one of them")

    from deme_cli.api.finetuning import (
        check_images,
        open_job,
        plan_from_scratch,
        plan_ranges,
        require_kept_runs,
        train_all,
    )

    job = open_job(
        settings,
        run.settings(DataConfig, **of_images),
        base or run.base, run, pipeline, device=device, dtype=dtype, compile=compile, shard=shard,
        force=force, jobs=jobs, world=world,
    )  # fmt: skip
    if from_scratch:
        plans = plan_from_scratch(job, from_scratch, output or Path(ModelConfig.base))
    else:
        plans = plan_ranges(job, run, range, output)
    if resume:
        require_kept_runs(plans)
    if dry_run:
        check_images(plans)
        for plan in plans:
            console.note(plan.describe())
        return
    console.result_paths(train_all(plans, jobs=jobs, world=world), as_json=as_json)
