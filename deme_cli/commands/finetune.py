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
    Json,
    Pipeline,
    Quiet,
    begin,
    option,
)
from deme_cli.config import DataConfig, FinetuneConfig, ModelConfig
from deme_cli.errors import ConfigError
from deme_cli.settings import parse_numbers

_C, _RATE, _IMAGES, _MORE = FinetuneConfig, "Optimisation", "Images and captions", "More"
_WEIGHTS, _MEMORY = "Weights of timesteps", "Memory"


def finetune(
    range: Annotated[
        str, typer.Option("--range", help="i/N, start:stop, 1/1 (the plain control), or all.")
    ] = "",
    p: Annotated[float | None, option(_C, "p", "--p")] = None,
    steps: Annotated[int | None, option(_C, "steps", "--steps")] = None,
    consistency: Annotated[float | None, option(_C, "consistency", "--consistency")] = None,
    projection: Annotated[str | None, option(_C, "projection", "--projection")] = None,
    data: Annotated[str | None, option(DataConfig, "source", "--data")] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="The base artifact [default: that of deme.toml].")
    ] = None,
    from_scratch: Annotated[
        Path | None,
        typer.Option(
            "--from-scratch",
            help="Train a base of your own: TOML or JSON with [model] and [scheduler].",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes for --range all.", min=1)] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Insist on continuing: fail where no run is kept.")
    ] = False,
    batch_size: Annotated[
        int | None, option(_C, "batch_size", "--batch-size", "-b", panel=_RATE)
    ] = None,
    accumulation: Annotated[
        int | None, option(_C, "accumulation", "--accumulation", panel=_RATE)
    ] = None,
    lr: Annotated[float | None, option(_C, "lr", "--lr", panel=_RATE)] = None,
    lr_schedule: Annotated[
        str | None, option(_C, "lr_schedule", "--lr-schedule", panel=_RATE)
    ] = None,
    warmup: Annotated[int | None, option(_C, "warmup", "--warmup", panel=_RATE)] = None,
    ema_decay: Annotated[float | None, option(_C, "ema_decay", "--ema-decay", panel=_RATE)] = None,
    ema_lengths: Annotated[
        str | None, option(_C, "ema_lengths", "--ema-lengths", panel=_RATE)
    ] = None,
    weight_decay: Annotated[
        float | None, option(_C, "weight_decay", "--weight-decay", panel=_RATE)
    ] = None,
    beta1: Annotated[float | None, option(_C, "beta1", "--beta1", panel=_RATE)] = None,
    beta2: Annotated[float | None, option(_C, "beta2", "--beta2", panel=_RATE)] = None,
    grad_clip: Annotated[float | None, option(_C, "grad_clip", "--grad-clip", panel=_RATE)] = None,
    loss_weighting: Annotated[
        str | None, option(_C, "loss_weighting", "--loss-weighting", panel=_WEIGHTS)
    ] = None,
    weighting_gamma: Annotated[
        float | None, option(_C, "weighting_gamma", "--weighting-gamma", panel=_WEIGHTS)
    ] = None,
    weighting_k: Annotated[
        float | None, option(_C, "weighting_k", "--weighting-k", panel=_WEIGHTS)
    ] = None,
    normalise_weighting: Annotated[
        bool | None,
        option(_C, "normalise_weighting", "--normalise-weighting/--raw-weighting", panel=_WEIGHTS),
    ] = None,
    multitask: Annotated[str | None, option(_C, "multitask", "--multitask", panel=_WEIGHTS)] = None,
    clusters: Annotated[int | None, option(_C, "clusters", "--clusters", panel=_WEIGHTS)] = None,
    cluster_by: Annotated[
        str | None, option(_C, "cluster_by", "--cluster-by", panel=_WEIGHTS)
    ] = None,
    multitask_lr: Annotated[
        float | None, option(_C, "multitask_lr", "--multitask-lr", panel=_WEIGHTS)
    ] = None,
    multitask_every: Annotated[
        int | None, option(_C, "multitask_every", "--multitask-every", panel=_WEIGHTS)
    ] = None,
    timesteps: Annotated[str | None, option(_C, "timesteps", "--timesteps", panel=_MORE)] = None,
    antithetic: Annotated[
        bool | None,
        option(_C, "antithetic", "--antithetic/--independent", panel=_MORE),
    ] = None,
    flip: Annotated[
        bool | None, option(DataConfig, "horizontal_flip", "--flip/--no-flip", panel=_IMAGES)
    ] = None,
    checkpoint_every: Annotated[
        int | None, option(_C, "checkpoint_every", "--checkpoint-every", panel=_MORE)
    ] = None,
    snapshot_every: Annotated[
        int | None, option(_C, "snapshot_every", "--snapshot-every", panel=_MORE)
    ] = None,
    held_out: Annotated[int | None, option(_C, "held_out", "--held-out", panel=_MORE)] = None,
    caption_dropout: Annotated[
        float | None, option(_C, "caption_dropout", "--caption-dropout", panel=_IMAGES)
    ] = None,
    captions: Annotated[
        str | None, option(DataConfig, "captions", "--captions", panel=_IMAGES)
    ] = None,
    crop: Annotated[str | None, option(DataConfig, "crop", "--crop", panel=_IMAGES)] = None,
    resolution: Annotated[
        int | None, option(DataConfig, "resolution", "--resolution", panel=_IMAGES)
    ] = None,
    cache: Annotated[str | None, option(_C, "cache", "--cache", panel=_IMAGES)] = None,
    seed: Annotated[int | None, option(_C, "seed", "--seed", panel=_MORE)] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        option(
            _C,
            "gradient_checkpointing",
            "--gradient-checkpointing/--keep-activations",
            panel=_MEMORY,
        ),
    ] = None,
    micro_batch: Annotated[
        int | None, option(_C, "micro_batch", "--micro-batch", panel=_MEMORY)
    ] = None,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Divide the network among the processes of a launch; changes rounding alone.",
            rich_help_panel=_MEMORY,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Artifact to write [default: ft_{i}of{N}.safetensors]."
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
    settings = run.settings(
        FinetuneConfig,
        p=p, steps=steps, consistency=consistency, projection=projection, batch_size=batch_size,
        accumulation=accumulation, lr=lr, lr_schedule=lr_schedule, warmup=warmup,
        ema_decay=ema_decay, weight_decay=weight_decay, beta1=beta1, beta2=beta2,
        grad_clip=grad_clip, timesteps=timesteps, antithetic=antithetic,
        checkpoint_every=checkpoint_every, held_out=held_out, seed=seed,
        caption_dropout=caption_dropout, cache=cache, snapshot_every=snapshot_every,
        loss_weighting=loss_weighting, weighting_gamma=weighting_gamma, weighting_k=weighting_k,
        normalise_weighting=normalise_weighting, multitask=multitask, clusters=clusters,
        cluster_by=cluster_by, multitask_lr=multitask_lr, multitask_every=multitask_every,
        gradient_checkpointing=gradient_checkpointing, micro_batch=micro_batch,
        ema_lengths=None if ema_lengths is None else parse_numbers(ema_lengths, "--ema-lengths"),
    )  # fmt: skip
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
        run.settings(
            DataConfig, source=data, horizontal_flip=flip, captions=captions, crop=crop,
            resolution=resolution,
        ),
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
