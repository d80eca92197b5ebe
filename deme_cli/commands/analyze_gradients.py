"""`deme analyze gradients`: which timesteps pull a network the same way, and which against it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.commands.analysis import (
    Data,
    Output,
    check_images,
    check_output,
    open_images,
    own_base,
    watch,
    write_analysis,
)
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
from deme_cli.config import SplitConfig
from deme_cli.errors import ConfigError
from deme_cli.training.affinity import AFFINITY_NAME, GradientConfig

_NOISY = 0.5  # halves that agree less have more noise than signal
_C = GradientConfig


def gradients(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=r"An artifact, a diffusers folder, a hub id or digits \[default: the base of "
            "deme.toml].",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    buckets: Annotated[int, option(_C, "buckets", "--buckets")] = _C.buckets,
    num: Annotated[int, option(_C, "num", "--num")] = _C.num,
    batch_size: Annotated[int, option(_C, "batch_size", "--batch-size", "-b")] = _C.batch_size,
    seed: Annotated[int, option(_C, "seed", "--seed")] = _C.seed,
    n: Annotated[int | None, option(SplitConfig, "n", "-n", "--num-ranges")] = None,
    output: Output = Path(AFFINITY_NAME),
    pipeline: Pipeline = None,
    config: ConfigPath = None,
    device: Device = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the gradients of timesteps by bucket; suggest ranges for `deme split --by gradient`.

    Example: deme analyze gradients --buckets 50
    """
    run = begin(config, quiet=quiet)
    settings = GradientConfig(buckets=buckets, num=num, batch_size=batch_size, seed=seed)
    ranges = run.settings(SplitConfig, n=n).n
    check_output(output, force=force)
    chosen = model or own_base(run)
    timesteps = _check_model(chosen, settings, ranges)
    images = check_images(run, data)
    console.note(
        f"{chosen}: {timesteps} in {buckets} buckets, {buckets * num:,} draws from {images.source}"
    )
    if dry_run:
        console.result_paths([], as_json=as_json, dry_run=True)
        return

    from dataclasses import replace
    from statistics import median

    from deme_cli.analysis.gradients.agreement import numbers_of, read_gradients, said_of
    from deme_cli.analysis.gradients.measure import GradientAnalysis, measure_gradients
    from deme_cli.analysis.gradients.picture import draw_gradients
    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.diffusion.denoiser import choose_device

    denoiser = open_denoiser(chosen, device=str(choose_device(device)))
    beside = Path(chosen).parent if Path(chosen).is_file() else output.parent
    record, examples = open_images(
        run, denoiser.record, images, split="train", beside=beside, pipeline=pipeline,
        device=device,
    )  # fmt: skip
    analysis = GradientAnalysis(
        replace(denoiser, record=record), examples, settings, output, chosen, ranges
    )
    steps = measure_gradients(analysis, force=force)
    affinity = watch(steps, "gradients", buckets * num, "draw")
    said = said_of(affinity)
    document = affinity.to_json(**said).encode()
    paths = write_analysis(output, draw_gradients(affinity), document, read_gradients(affinity))
    if median(affinity.reliability) < _NOISY:
        console.warn(
            "noise in the gradients draws all cosines towards 0; raise --num for more draws"
        )
    console.result_paths(
        paths, as_json=as_json, ranges=[str(span) for span in affinity.ranges],
        buckets=[str(bucket) for bucket in affinity.buckets],
        norms=affinity.norms, reliability=affinity.reliability, mean_norms=said["mean_norms"],
        **numbers_of(affinity),
    )  # fmt: skip


def _check_model(model: str, settings: GradientConfig, num_ranges: int) -> str:
    """What can be told before torch is imported; returns what to say of the timesteps."""
    from deme_cli.diffusion.locate import locate_model, peek_timesteps

    if num_ranges > settings.buckets:
        raise ConfigError(
            f"cannot form {num_ranges} ranges of {settings.buckets} buckets; choose a smaller -n "
            f"or more --buckets"
        )
    num_timesteps = peek_timesteps(locate_model(model))
    if num_timesteps:
        settings.parts(num_timesteps)
    return f"{num_timesteps or 'all'} timesteps"
