"""`analyze_gradients`: which timesteps pull a network the same way, and which against it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median

from deme_cli import console
from deme_cli.analysis_config import AFFINITY_NAME, GradientConfig, bucket_ranges
from deme_cli.api import analyzing
from deme_cli.config import DataConfig, SplitConfig
from deme_cli.errors import ConfigError
from deme_cli.run_file import RunFile

_NOISY = 0.5  # halves that agree less have more noise than signal


def analyze_gradients(
    model: str | Path | None = None,
    settings: GradientConfig | None = None,
    *,
    images: DataConfig | None = None,
    num_ranges: int | None = None,
    output: Path = Path(AFFINITY_NAME),
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    force: bool = False, dry_run: bool = False,
) -> analyzing.Analysis:  # fmt: skip
    """Compare the gradients of timesteps, bucket by bucket; suggest ranges of those that agree.

    model: the base of `run` if None.   num_ranges: how many to suggest, by which `split` with
    by = gradient divides; that of `run` if None.

    Warns where noise hides what the gradients have in common. The rest is as for `analyze_losses`.
    """
    run, settings = run or RunFile(), settings or GradientConfig()
    num_ranges = run.settings(SplitConfig, n=num_ranges).n
    analyzing.check_output(output, force=force)
    model = str(model or analyzing.own_base(run))
    timesteps = _check_model(model, settings, num_ranges)
    images = analyzing.check_images(images, run, split="train")
    console.note(
        f"{model}: {timesteps} in {settings.buckets} buckets, "
        f"{settings.buckets * settings.num:,} draws from {images.source}"
    )
    if dry_run:
        return analyzing.nothing_written(output, dry_run=True)

    from deme_cli.analysis.gradients.agreement import numbers_of, said_of
    from deme_cli.analysis.gradients.measure import GradientAnalysis, measure_gradients
    from deme_cli.analysis.gradients.picture import draw_gradients
    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.diffusion.denoiser import choose_device

    denoiser = open_denoiser(
        model, pipeline=run.pipeline(pipeline), device=str(choose_device(device))
    )
    record, examples = analyzing.open_images(
        denoiser.record, images, run, split="train", beside=analyzing.cache_folder(model, output),
        pipeline=pipeline, device=device,
    )  # fmt: skip
    denoiser = replace(denoiser, record=record)
    analysis = GradientAnalysis(denoiser, examples, settings, output, model, num_ranges)
    steps = measure_gradients(analysis, force=force)
    affinity = analyzing.watch(steps, "gradients", settings.buckets * settings.num, "draw")
    document = affinity.to_json(**said_of(affinity)).encode()
    made = analyzing.write_analysis(
        output, draw_gradients(affinity), document,
        ("ranges", "buckets", "norms", "reliability", "mean_norms"), **numbers_of(affinity),
    )  # fmt: skip
    if median(affinity.reliability) < _NOISY:
        console.warn(
            "noise in the gradients draws all cosines towards 0; raise --num for more draws"
        )
    return made


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
        bucket_ranges(settings.buckets, num_timesteps)
    return f"{num_timesteps or 'all'} timesteps"
