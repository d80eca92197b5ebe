"""`deme analyze`: figures of what timesteps have in common, and the numbers behind them.

Each analysis is a subcommand: a JSON file, and a picture of it beside.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.commands.caching import fill_with_bar
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
from deme_cli.config import DataConfig, FinetuneConfig, SplitConfig
from deme_cli.errors import ConfigError, MissingError
from deme_cli.outputs import require_output, write_whole
from deme_cli.run_file import RunFile
from deme_cli.timesteps import split_uniform
from deme_cli.training.affinity import AFFINITY_NAME, Affinity, GradientConfig

if TYPE_CHECKING:
    from deme_cli.analysis.gradients import Analysis
    from deme_cli.diffusion.denoiser import Denoiser
    from deme_cli.training.examples import Examples

_MEANS = ("within", "across")  # what Affinity.mean_cosines returns
_NOISY = 0.5  # halves that agree less have more noise than signal
_C = GradientConfig


def analyze() -> None:
    """Draw what a model's timesteps have in common, for this run.

    Example: deme analyze gradients
    """


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
    data: Annotated[str | None, option(DataConfig, "source", "--data")] = None,
    buckets: Annotated[int, option(_C, "buckets", "--buckets")] = _C.buckets,
    num: Annotated[int, option(_C, "num", "--num")] = _C.num,
    batch_size: Annotated[int, option(_C, "batch_size", "--batch-size", "-b")] = _C.batch_size,
    seed: Annotated[int, option(_C, "seed", "--seed")] = _C.seed,
    n: Annotated[int | None, option(SplitConfig, "n", "-n", "--num-ranges")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file; pictures go beside it.")
    ] = Path(AFFINITY_NAME),
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
    images = run.settings(DataConfig, source=data)
    ranges = run.settings(SplitConfig, n=n).n
    pictures = [output.with_suffix(suffix) for suffix in (".png", ".svg")]
    _check_output(output, pictures, force=force)
    chosen, pipeline = model or _own_base(run), run.pipeline(pipeline)
    timesteps = _check_model(chosen, images, settings, ranges)
    console.note(
        f"{chosen}: {timesteps} in {buckets} buckets, {buckets * num:,} draws from {images.source}"
    )
    if dry_run:
        console.result_paths([], as_json=as_json, dry_run=True)
        return

    from deme_cli.analysis.gradients import Analysis, sketches_path

    denoiser, examples = _open(run, chosen, images, pipeline, output, device)
    affinity = _measure(Analysis(denoiser, examples, settings, output, chosen, ranges), force)
    _write(affinity, output, pictures)
    sketches_path(output).unlink(missing_ok=True)
    console.result_paths(
        [output, *pictures], as_json=as_json,
        ranges=[str(span) for span in affinity.ranges],
        buckets=[str(bucket) for bucket in affinity.buckets],
        norms=affinity.norms, reliability=affinity.reliability, **_read_out(affinity),
    )  # fmt: skip


def _check_output(output: Path, pictures: list[Path], *, force: bool) -> None:
    """The file must be free or `force`; pictures of an earlier one are drawn over."""
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: expected a name that ends in .json")
    require_output(output, force=force)
    for picture in pictures:
        require_output(picture, force=True)


def _own_base(run: RunFile) -> str:
    if not run.base.exists():
        raise MissingError(
            f"{run.base}: no base there; name a MODEL, or make a base with `deme split`"
        )
    return str(run.base)


def _check_model(model: str, images: DataConfig, settings: GradientConfig, num_ranges: int) -> str:
    """What can be told before torch is imported; returns what to say of the timesteps."""
    from deme_cli.data.places import find_place
    from deme_cli.diffusion.locate import locate_model, peek_timesteps

    if num_ranges > settings.buckets:
        raise ConfigError(
            f"cannot form {num_ranges} ranges of {settings.buckets} buckets; choose a smaller -n "
            f"or more --buckets"
        )
    if not images.source:
        raise ConfigError("no images: set [data] source in deme.toml, or use --data")
    num_timesteps = peek_timesteps(locate_model(model))
    if num_timesteps:
        settings.parts(num_timesteps)
    find_place(images.source)
    return f"{num_timesteps or 'all'} timesteps"


def _open(
    run: RunFile, model: str, images: DataConfig, pipeline: str | None, output: Path, device: str
) -> tuple[Denoiser, Examples]:
    """The model, and its training images with their latents where it has any."""
    from dataclasses import replace

    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.diffusion.companions import open_companions
    from deme_cli.diffusion.denoiser import choose_device
    from deme_cli.training.materials import name_companions, open_examples

    device = str(choose_device(device))
    denoiser = open_denoiser(model, device=device)
    record = name_companions(denoiser.record, pipeline)
    companions = open_companions(record, pipeline=pipeline, device=device)
    beside = Path(model).parent if Path(model).is_file() else output.parent
    cache = run.settings(FinetuneConfig).cache
    examples = open_examples(images, companions, split="train", cache=cache, beside=beside)
    fill_with_bar(examples)
    return replace(denoiser, record=record), examples


def _measure(analysis: Analysis, force: bool) -> Affinity:
    from deme_cli.analysis.gradients import measure_gradients

    total = analysis.config.buckets * analysis.config.num
    with console.progress("gradients", total, "draw") as bar:
        for step in measure_gradients(analysis, force=force):
            if isinstance(step, Affinity):
                return step
            if step.note:
                console.note(step.note)
            bar.advance(step.done)
    raise AssertionError("an analysis ends in an affinity")


def _write(affinity: Affinity, output: Path, pictures: list[Path]) -> None:
    """The pictures, then the file, which says that all is done."""
    from deme_cli.analysis.gradients_figure import draw_gradients

    for picture, drawn in zip(pictures, draw_gradients(affinity), strict=True):
        write_whole(picture, [drawn])
    write_whole(output, [affinity.to_json().encode()])


def _read_out(affinity: Affinity) -> dict[str, float | None]:
    """Say in a sentence what was found; the numbers in it."""
    count, total = len(affinity.ranges), affinity.buckets[-1].stop
    reliability = statistics.median(affinity.reliability)
    numbers = {"reliability_median": reliability}
    for prefix, ranges in (("", affinity.ranges), ("equal_", split_uniform(count, total))):
        means = affinity.mean_cosines(ranges)
        numbers |= {f"{prefix}{name}": mean for name, mean in zip(_MEANS, means, strict=True)}
    shown = {key: "-" if math.isnan(mean) else f"{mean:.2f}" for key, mean in numbers.items()}
    console.note(
        f"{count} ranges by gradient, {', '.join(map(str, affinity.ranges))}: mean cosine "
        f"{shown['within']} within, {shown['across']} across (equal ranges: "
        f"{shown['equal_within']}, {shown['equal_across']}); two halves of a bucket's "
        f"draws agree to {reliability:.2f} (median)"
    )
    if reliability < _NOISY:
        console.warn(
            "noise in the gradients draws all cosines towards 0; raise --num for more draws"
        )
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}
