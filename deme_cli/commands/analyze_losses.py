"""`deme analyze losses`: the denoising loss of each model against the timestep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.analysis.document import document_bytes
from deme_cli.analysis.loss_config import LossConfig
from deme_cli.commands.analysis import (
    Data,
    Split,
    check_images,
    check_output,
    open_images_of,
    watch,
    write_analysis,
)
from deme_cli.commands.options import (
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
from deme_cli.config import SplitConfig
from deme_cli.errors import ConfigError
from deme_cli.timesteps import split_uniform

if TYPE_CHECKING:
    from deme_cli.analysis.intervals import Estimate
    from deme_cli.analysis.lineup import Entrant
    from deme_cli.analysis.losses import Curve, Losses
    from deme_cli.run_file import RunFile
    from deme_cli.timesteps import TimestepRange

_C = LossConfig


def losses(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help=r"Artifacts, diffusers folders or hub ids; the others are compared with the first "
            r"\[default: base, experts and merged of this folder].",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    split: Split = "held-out",
    buckets: Annotated[int, option(_C, "buckets", "--buckets")] = _C.buckets,
    num: Annotated[int, option(_C, "num", "--num")] = _C.num,
    batch_size: Annotated[int, option(_C, "batch_size", "--batch-size", "-b")] = _C.batch_size,
    seed: Annotated[int, option(_C, "seed", "--seed")] = _C.seed,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--num-ranges",
            help=r"Equal ranges to sum up over \[default: those of the experts, else the split].",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file; pictures go beside it.")
    ] = Path("losses.json"),
    pipeline: Pipeline = None,
    config: ConfigPath = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show where on [0, T) each model gained on the base, and where it lost. Look at this first.

    Example: deme analyze losses base.safetensors ft_*.safetensors merged.safetensors
    """
    run = begin(config, quiet=quiet)
    settings = LossConfig(buckets=buckets, num=num, batch_size=batch_size, seed=seed)
    pictures = check_output(output, force=force)
    images = check_images(run, data)

    from deme_cli.analysis.lineup import folder_models, line_up

    entrants = line_up(models or folder_models(run.base), device=device, dtype=dtype)
    horizon = entrants[0].records[0].num_train_timesteps
    if buckets > horizon:
        raise ConfigError(
            f"buckets = {buckets}: this model has {horizon} timesteps; choose fewer --buckets"
        )
    ranges = _ranges(run, entrants, n, horizon)
    names = ", ".join(entrant.name for entrant in entrants)
    console.note(f"{names}: {buckets * num:,} draws each from {images.source} ({split})")
    if dry_run:
        console.result_paths([], as_json=as_json, dry_run=True)
        return

    from deme_cli.analysis import intervals
    from deme_cli.analysis.losses import LossAnalysis, measure_losses
    from deme_cli.analysis.losses_figure import draw_losses
    from deme_cli.diffusion.schedule import read_schedule

    record, examples = open_images_of(
        run, entrants[0].records[0], images, split=split, beside=output.parent, pipeline=pipeline,
        device=device,
    )  # fmt: skip
    schedule = read_schedule(record.scheduler_config)
    analysis = LossAnalysis(
        entrants, examples, schedule, settings, ranges, split, output, dtype
    )  # fmt: skip
    alone = sum(len(entrant.experts) == 1 for entrant in entrants)
    found = watch(measure_losses(analysis, force=force), "losses", alone * buckets * num, "draw")
    reading = _reading(found)
    protocol = {
        "models": {entrant.name: entrant.fingerprints for entrant in entrants},
        "data": {"source": examples.source, "fingerprint": examples.fingerprint, "split": split},
        "images": found.num_images, "num": num, "seed": seed, "dtype": dtype,
        "intervals": intervals.MEANING,
    }  # fmt: skip
    foot = (
        f"{num} draws per bucket from {found.num_images} images of {images.source} ({split}), the "
        f"same for all; bands: 95 %, pointwise, over images"
    )
    drawn = draw_losses(found, title="Where each model gained, and where it lost", foot=foot)
    document = _document(found)
    write_analysis(output, pictures, drawn, document_bytes("losses", reading, protocol, **document))
    console.note(reading)
    console.result_paths(
        [output, *pictures], as_json=as_json, reading=reading, models=document["models"]
    )


def _ranges(
    run: RunFile, entrants: list[Entrant], n: int | None, num_train_timesteps: int
) -> list[TimestepRange]:
    """-n equal ranges, else the ensemble's, else those of deme.toml.

    Raises ConfigError where those of deme.toml are of another number of timesteps.
    """
    from deme_cli.analysis.losses import own_ranges

    if n is not None:
        return split_uniform(n, num_train_timesteps)
    if own := own_ranges(entrants):
        return own
    split = run.settings(SplitConfig)
    ranges = split.timestep_ranges
    if ranges and (stop := max(span.stop for span in ranges)) != num_train_timesteps:
        raise ConfigError(
            f"[split] ranges: they end at {stop}, but this model has {num_train_timesteps} "
            f"timesteps; correct deme.toml, or give -n"
        )
    return ranges or split_uniform(split.n, num_train_timesteps)


def _document(found: Losses) -> dict:
    """What the file holds: a row per model, lists by bucket in the order of `buckets`."""
    return {
        "ranges": [str(span) for span in found.ranges],
        "buckets": [str(bucket) for bucket in found.buckets],
        "models": [_row(found, curve) for curve in found.curves],
    }


def _row(found: Losses, curve: Curve) -> dict:
    row = {
        "name": curve.name,
        "kind": curve.kind,
        "range": None if curve.span is None else str(curve.span),
        "loss": curve.loss,
        "loss_by_range": curve.range_losses,
        "losses": curve.losses.tolist(),
        "halves": curve.halves.tolist(),
    }
    if curve.overall is not None:
        row |= {
            "minus": found.curves[0].name,
            "difference": _estimate(curve.overall),
            "difference_by_range": [_estimate(one) for one in curve.by_range or []],
            "differences": curve.differences.tolist(),
            "difference_halves": curve.difference_halves.tolist(),
        }
    return row


def _estimate(one: Estimate) -> dict[str, float]:
    return {"mean": one.mean, "half": one.half}


def _reading(found: Losses) -> str:
    """In a sentence: what each whole model gained or lost, and in which ranges."""
    first, others = found.curves[0], [c for c in found.curves[1:] if c.span is None]
    others = others or found.curves[1:]
    if not others:
        low, high = int(first.losses.argmin()), int(first.losses.argmax())
        return (
            f"the loss of {first.name} is {first.loss:.3g} over all timesteps, from "
            f"{first.losses[low]:.3g} in {found.buckets[low]} to {first.losses[high]:.3g} in "
            f"{found.buckets[high]}"
        )
    parts = []
    for curve in others:
        better, worse = _told(found, curve, -1), _told(found, curve, 1)
        words = [f"lower in {', '.join(better)}" if better else "lower in no range"]
        words += [f"higher in {', '.join(worse)}"] if worse else []
        assert curve.overall is not None, "only the first model has nothing to be compared with"
        change, half = (100 / first.loss * v for v in (curve.overall.mean, curve.overall.half))
        shown = f"{half:.1f}" if half == half else "?"  # one image alone has no interval
        parts.append(f"{curve.name} {change:+.1f} ± {shown} % ({', '.join(words)})")
    return f"loss over all timesteps against {first.name}: {'; '.join(parts)}"


def _told(found: Losses, curve: Curve, sign: int) -> list[str]:
    """Ranges in which the interval tells the change from 0, in the direction of `sign`."""
    pairs = zip(found.ranges, curve.by_range or [], strict=True)
    return [str(span) for span, one in pairs if one.is_told_from_zero and one.mean * sign > 0]
