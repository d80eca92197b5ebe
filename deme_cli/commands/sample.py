"""`deme sample`: draw images from one model, and what it shares with `deme ensemble-sample`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.options import (
    ConfigPath,
    Device,
    DryRun,
    Dtype,
    Force,
    Json,
    Quiet,
    begin,
    option,
)
from deme_cli.config import SampleConfig
from deme_cli.errors import writing
from deme_cli.outputs import require_output

if TYPE_CHECKING:
    from deme_cli.records import DenoiserRecord
    from deme_cli.sampling.sampler import SamplingExpert

_C = SampleConfig
Num = Annotated[int | None, option(_C, "num", "-n", "--num")]
Sampler = Annotated[str | None, option(_C, "sampler", "--sampler")]
Steps = Annotated[int | None, option(_C, "steps", "--steps")]
Eta = Annotated[float | None, option(_C, "eta", "--eta")]
Spacing = Annotated[str | None, option(_C, "spacing", "--spacing")]
BatchSize = Annotated[int | None, option(_C, "batch_size", "--batch-size", "-b")]
Seed = Annotated[int | None, option(_C, "seed", "--seed")]
OUTPUT_HELP = "A .safetensors artifact, or a folder for PNG files"


@dataclass(frozen=True)
class Request:
    """Where the images of a command go, and how it speaks."""

    output: Path
    dtype: str
    force: bool
    dry_run: bool
    as_json: bool

    def check(self) -> None:
        """What can be told before anything heavy is loaded."""
        with writing(self.output):
            to_artifact = self.output.suffix == ".safetensors" and not self.output.is_dir()
        if to_artifact:
            require_output(self.output, force=self.force)


def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An artifact, a diffusers folder, a hub id, or digits.",
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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=rf"{OUTPUT_HELP} \[default: {{model}}-samples.safetensors]."
        ),
    ] = None,
    config: ConfigPath = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw images from one model; run the same command again to continue.

    A preview lies beside them. Image i depends on the seed and i alone.

    Example: deme sample merged.safetensors -n 64
    """
    from deme_cli.artifacts import read_record
    from deme_cli.diffusion.locate import locate_model

    run = begin(config, quiet=quiet)
    settings = run.settings(
        SampleConfig, num=num, sampler=sampler, steps=steps, eta=eta, spacing=spacing,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    request = Request(output or _default_output(model), dtype, force, dry_run, as_json)
    request.check()
    place = locate_model(model)
    if place.is_file():
        _warn_of_lone_expert(model, read_record(place))

    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.sampling.sampler import single

    denoiser = open_denoiser(model, device=device, dtype=dtype)
    draw(single(denoiser), [denoiser.record], settings, request)


def _default_output(model: str) -> Path:
    name = Path(model).expanduser().resolve().name.removesuffix(".safetensors")
    return Path(f"{name}-samples.safetensors")


def _warn_of_lone_expert(model: str, record: Any) -> None:
    from deme_cli.records import ExpertRecord

    if isinstance(record, ExpertRecord) and len(record.timesteps) < record.num_train_timesteps:
        console.warn(
            f"{model} is the expert of timesteps {record.timesteps} and will denoise all "
            f"{record.num_train_timesteps}; deme ensemble-sample takes each expert for its own"
        )


def draw(
    experts: Sequence[SamplingExpert],
    records: Sequence[DenoiserRecord],
    config: SampleConfig,
    request: Request,
    *,
    hold_one: bool = False,
) -> None:
    """Draw what was asked, with a progress bar, and print the paths."""
    from deme_cli.diffusion.denoiser import sample_shape
    from deme_cli.sampling.draw import Drawn, draw_samples
    from deme_cli.sampling.protocol import protocol_card
    from deme_cli.sampling.store import Order

    card = protocol_card(records, config, dtype=request.dtype)
    channels, height, width = sample_shape(records[0].model_config)
    order = Order(
        request.output, card, (height, width, channels), config.batch_size, force=request.force
    )
    if request.dry_run:
        _say_what_would_run(order.path, order.shape, card, as_json=request.as_json)
        return
    began = time.monotonic()
    with console.progress("sampling", config.num, "image") as bar:
        for record in draw_samples(experts, config, order, hold_one=hold_one):
            if isinstance(record, Drawn):
                drawn = record
            else:
                bar.advance(record.done * config.num // record.total)
    seconds = time.monotonic() - began
    console.result_paths(
        [drawn.images, drawn.preview],
        as_json=request.as_json,
        num=config.num,
        kept=drawn.num_kept,
        seconds=round(seconds, 3),
        protocol=card,
    )


def _say_what_would_run(
    path: Path, shape: tuple[int, int, int], card: dict[str, Any], *, as_json: bool
) -> None:
    height, width, channels = shape
    console.note(
        f"would draw {card['num']} images ({height} x {width}, {channels} channels) to {path}: "
        f"{card['model']} {' '.join(mark[:12] for mark in card['fingerprints'])}, "
        f"{card['sampler']}, {card['steps']} steps, {card['spacing']} spacing, seed {card['seed']}"
    )
    if as_json:
        console.result_json({"dry_run": True, "paths": [str(path)], "protocol": card})
