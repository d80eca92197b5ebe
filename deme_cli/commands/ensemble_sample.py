"""`deme ensemble-sample`: draw images with each expert denoising its own timesteps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli.commands.options import ConfigPath, Device, DryRun, Dtype, Force, Json, Quiet, begin
from deme_cli.commands.sample import (
    OUTPUT_HELP,
    BatchSize,
    Eta,
    Num,
    Request,
    Sampler,
    Seed,
    Spacing,
    Steps,
    draw,
)
from deme_cli.config import SampleConfig


def ensemble_sample(
    experts: Annotated[
        list[Path],
        typer.Argument(
            metavar="EXPERT...",
            help="Experts of one base whose ranges cover all timesteps.",
            show_default=False,
        ),
    ],
    num: Num = None,
    sampler: Sampler = None,
    steps: Steps = None,
    eta: Eta = None,
    spacing: Spacing = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    hold_one: Annotated[
        bool,
        typer.Option(
            "--hold-one",
            help="Keep one expert in memory at a time; a stopped run then repeats more.",
        ),
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help=f"{OUTPUT_HELP}.")] = Path(
        "ensemble.safetensors"
    ),
    config: ConfigPath = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw images from an ensemble of experts (Eq. 7); run the same command again to continue.

    Timestep t goes to the expert whose range holds it. It costs what one model costs.

    Example: deme ensemble-sample ft_*.safetensors -n 64
    """
    run = begin(config, quiet=quiet)
    settings = run.settings(
        SampleConfig, num=num, sampler=sampler, steps=steps, eta=eta, spacing=spacing,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    request = Request(output, dtype, force, dry_run, as_json)
    request.check()

    from deme_cli.sampling.ensemble import open_ensemble, read_ensemble

    records = [member.record for member in read_ensemble(experts)]
    opened = open_ensemble(experts, device=device, dtype=dtype)
    draw(opened, records, settings, request, hold_one=hold_one)
