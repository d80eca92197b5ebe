"""`deme analyze losses`: the denoising loss of each model against the timestep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.analysis.config import LossConfig
from deme_cli.analysis.document import document_bytes
from deme_cli.commands.analysis import (
    Data,
    Output,
    Split,
    check_images,
    check_output,
    open_images,
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
    from deme_cli.analysis.lineup import Entrant
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
    output: Output = Path("losses.json"),
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
    check_output(output, force=force)
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
    from deme_cli.analysis.losses.measure import LossAnalysis, measure_losses
    from deme_cli.analysis.losses.picture import draw_losses
    from deme_cli.analysis.losses.reading import document_of, read_losses
    from deme_cli.diffusion.schedule import read_schedule

    record, examples = open_images(
        run, entrants[0].records[0], images, split=split, beside=output.parent, pipeline=pipeline,
        device=device,
    )  # fmt: skip
    schedule = read_schedule(record.scheduler_config)
    analysis = LossAnalysis(
        entrants, examples, schedule, settings, ranges, split, output, dtype
    )  # fmt: skip
    alone = sum(len(entrant.experts) == 1 for entrant in entrants)
    found = watch(measure_losses(analysis, force=force), "losses", alone * buckets * num, "draw")
    reading = read_losses(found)
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
    told = document_of(found)
    document = document_bytes("losses", reading, protocol, **told)
    paths = write_analysis(output, drawn, document, reading)
    console.result_paths(paths, as_json=as_json, reading=reading, models=told["models"])


def _ranges(
    run: RunFile, entrants: list[Entrant], n: int | None, num_train_timesteps: int
) -> list[TimestepRange]:
    """-n equal ranges, else the ensemble's, else those of deme.toml.

    Raises ConfigError where those of deme.toml are of another number of timesteps.
    """
    from deme_cli.analysis.losses.measure import own_ranges

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
