"""`deme sample`: draw images from one model, and what it shares with `deme ensemble-sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.api.drawing import DrawingJob, default_output, sample_settings
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
    option,
    takes_settings,
)
from deme_cli.config import EvalConfig, SampleConfig

Prompt = Annotated[
    str | None,
    typer.Option("--prompt", help="One prompt for all images.", rich_help_panel="What is shown",
                 show_default=False),
]  # fmt: skip
Protocol = Annotated[str | None, option(EvalConfig, "protocol")]
OUTPUT_HELP = "A .safetensors artifact, or a folder for PNG files"


@takes_settings
def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An artifact, a diffusers folder, a hub id, or digits.",
            show_default=False,
        ),
    ],
    given: Annotated[Given, OptionsOf(SampleConfig)],
    prompt: Prompt = None,
    protocol: Protocol = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=rf"{OUTPUT_HELP} \[default: {{model}}-samples.safetensors]."
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
    """Draw images from one model; run the same command again to continue.

    A preview lies beside them. Image i depends on the seed, i and its prompt or
    class alone. Processes of one launch (torchrun, accelerate launch, srun)
    share the batches.

    Example: deme sample merged.safetensors -n 64
    """
    console.set_quiet(quiet)
    world = meet(device)
    run = begin(config, quiet=quiet)
    settings = sample_settings(run, given, prompt=prompt, protocol=protocol)
    job = DrawingJob(
        [model], settings, output or default_output(model), run.pipeline(pipeline),
        world.device or device, dtype, compile, force, world=world,
    )  # fmt: skip
    draw(job, dry_run=dry_run, as_json=as_json)


def draw(job: DrawingJob, *, dry_run: bool, as_json: bool) -> None:
    """Draw what was asked, or say what would be drawn; then the paths."""
    if dry_run:
        card = job.say_what_would_run()
        if as_json:
            console.result_json({"dry_run": True, "paths": [str(job.output)], "protocol": card})
    elif images := job.run():
        console.result_paths(
            [images.path, images.preview], as_json=as_json, num=images.num, kept=images.num_kept,
            seconds=images.seconds, protocol=images.protocol,
        )  # fmt: skip
