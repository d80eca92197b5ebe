"""`deme finetune`: train one expert, all of them, the plain control, or a base from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deme_cli import console
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
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.distributed import meet
from deme_cli.errors import ConfigError

LISTED = (  # of the settings; the others are options as well, and have their sentence in deme.toml
    "p", "steps", "batch_size", "accumulation", "lr", "lr_schedule", "warmup", "consistency",
    "projection", "loss_weighting", "multitask", "checkpoint_every",
    "gradient_checkpointing", "seed", "source", "resolution",
)  # fmt: skip


FromScratch = Annotated[
    Path | None,
    typer.Option("--from-scratch",
                 help=r"Train a base of your own: TOML or JSON with \[model] and \[scheduler]."),
]  # fmt: skip
Shard = Annotated[
    bool,
    typer.Option("--shard", rich_help_panel="Memory", hidden=True,
                 help="Divide the network among the processes of a launch: the same result."),
]  # fmt: skip
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help=r"Artifact to write \[default: ft_{i}of{N}.safetensors]."),
]


@takes_settings
def finetune(
    range: Annotated[
        str, typer.Option("--range", help="i/N, start:stop, 1/1 (the plain control), or all.")
    ] = "",
    *,
    given: Annotated[Given, OptionsOf(FinetuneConfig, listed=LISTED)],
    of_images: Annotated[Given, OptionsOf(DataConfig, listed=LISTED)],
    base: Annotated[
        Path | None, typer.Option("--base", help=r"The base \[default: that of deme.toml].")
    ] = None,
    from_scratch: FromScratch = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes for --range all.", min=1)] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Insist on continuing: fail where no run is kept.")
    ] = False,
    shard: Shard = False,
    output: Output = None,
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

    Processes of one launch (torchrun, accelerate launch, srun) share each batch. Every other
    key of deme.toml's tables finetune and data is an option, too, as --caption-dropout 0.2.

    Example: deme finetune --range 2/4 --p 0.1
    """
    import deme_cli

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
    common: dict[str, Any] = {
        "images": run.settings(DataConfig, **of_images), "output": output, "run": run,
        "pipeline": pipeline, "device": device, "dtype": dtype, "compile": compile, "shard": shard,
        "force": force, "resume": resume, "dry_run": dry_run, "world": world,
    }  # fmt: skip
    with console.showing() as progress:
        if from_scratch:
            paths = deme_cli.train_base(from_scratch, settings, **common, progress=progress)
        else:
            paths = deme_cli.finetune(
                range, settings, base=base, jobs=jobs, **common, progress=progress
            )
    if not dry_run:
        console.result_paths(paths, as_json=as_json)
