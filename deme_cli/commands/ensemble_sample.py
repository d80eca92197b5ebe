"""`deme ensemble-sample`: draw images with each expert denoising its own timesteps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from deme_cli.commands.sample import OUTPUT_HELP, Prompt, Protocol, sample_settings, tell
from deme_cli.config import SampleConfig
from deme_cli.distributed import meet
from deme_cli.sampling.sample import ENSEMBLE_NAME


@takes_settings
def ensemble_sample(
    experts: Annotated[list[Path], typer.Argument(
        metavar="EXPERT...", help="Experts of one base whose ranges cover all timesteps.",
        show_default=False,
    )],
    given: Annotated[Given, OptionsOf(SampleConfig)],
    prompt: Prompt = None,
    protocol: Protocol = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help=f"{OUTPUT_HELP}.")
    ] = Path(ENSEMBLE_NAME),
    pipeline: Pipeline = None, config: ConfigPath = None, device: Device = "auto",
    dtype: Dtype = "fp32", compile: Compile = "auto", force: Force = False,
    dry_run: DryRun = False, as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Draw images from an ensemble of experts (Eq. 7); run the same command again to continue.

    Timestep t goes to the expert whose range holds it. It costs what one model
    costs. Processes of one launch (torchrun, accelerate launch, srun) share the
    batches.

    Example: deme ensemble-sample ft_*.safetensors -n 64
    """
    from deme_cli import ensemble_sample

    console.set_quiet(quiet)
    meet(device)
    run = begin(config, quiet=quiet)
    settings = sample_settings(run, given, prompt=prompt, protocol=protocol)
    with console.showing() as progress:
        images = ensemble_sample(
            experts, settings, output=output, run=run, pipeline=pipeline, device=device,
            dtype=dtype, compile=compile, force=force, dry_run=dry_run, progress=progress,
        )  # fmt: skip
    tell(images, dry_run=dry_run, as_json=as_json)
