"""`deme ensemble-sample`: draw images with each expert denoising its own timesteps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.api.drawing import ENSEMBLE_NAME, DrawingJob, sample_settings
from deme_cli.commands.launching import meet
from deme_cli.commands.options import (
    Compile,
    ConfigPath,
    Device,
    DryRun,
    Dtype,
    Force,
    Json,
    Pipeline,
    Quiet,
    begin,
)
from deme_cli.commands.sample import (
    OUTPUT_HELP,
    BatchSize,
    Classes,
    Eta,
    Guidance,
    Num,
    PerPrompt,
    Prompt,
    PromptColumn,
    Prompts,
    Protocol,
    ResizeTo,
    Resolution,
    Sampler,
    Seed,
    Spacing,
    Steps,
    draw,
)


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
    prompts: Prompts = None,
    prompt: Prompt = None,
    prompt_column: PromptColumn = None,
    per_prompt: PerPrompt = None,
    classes: Classes = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    steps: Steps = None,
    eta: Eta = None,
    spacing: Spacing = None,
    resolution: Resolution = None,
    resize_to: ResizeTo = None,
    protocol: Protocol = None,
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
        ENSEMBLE_NAME
    ),
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
    """Draw images from an ensemble of experts (Eq. 7); run the same command again to continue.

    Timestep t goes to the expert whose range holds it. It costs what one model
    costs. Processes of one launch (torchrun, accelerate launch, srun) share the
    batches.

    Example: deme ensemble-sample ft_*.safetensors -n 64
    """
    console.set_quiet(quiet)
    world = meet(device)
    run = begin(config, quiet=quiet)
    options = {
        "num": num, "prompts": prompts, "prompt_column": prompt_column, "per_prompt": per_prompt,
        "classes": classes, "guidance": guidance, "sampler": sampler, "steps": steps, "eta": eta,
        "spacing": spacing, "resolution": resolution, "resize": resize_to,
        "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    settings = sample_settings(run, options, prompt=prompt, protocol=protocol)
    job = DrawingJob(
        [str(path) for path in experts], settings, output, run.pipeline(pipeline),
        world.device or device, dtype, compile, force, is_ensemble=True, hold_one=hold_one,
        world=world,
    )  # fmt: skip
    draw(job, dry_run=dry_run, as_json=as_json)
