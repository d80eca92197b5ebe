"""What every `deme analyze …` does: check its output, open its images, show its way, write all."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from deme_cli import console
from deme_cli.analysis.document import picture_paths
from deme_cli.api.caching import fill_with_bar
from deme_cli.commands.options import option
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.errors import ConfigError, MissingError
from deme_cli.outputs import require_output, write_whole
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.analysis.unfinished import Step
    from deme_cli.diffusion.denoiser import Denoiser
    from deme_cli.records import DenoiserRecord
    from deme_cli.training.examples import Examples

Result = TypeVar("Result")
SPLITS = ("train", "held-out")
Data = Annotated[str | None, option(DataConfig, "source", "--data")]


def _known_split(name: str) -> str:
    if name not in SPLITS:
        raise ConfigError(f"--split {name}: expected one of {', '.join(SPLITS)}")
    return name


Split = Annotated[
    str,
    typer.Option(
        "--split", callback=_known_split, help=f"Which of the images: {', '.join(SPLITS)}."
    ),
]


def check_output(output: Path, *, force: bool) -> list[Path]:
    """The output must be free or `force`; returns where its pictures go, which are drawn over."""
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: expected a name that ends in .json")
    pictures = picture_paths(output)
    require_output(output, force=force)
    for picture in pictures:
        require_output(picture, force=True)
    return pictures


def own_base(run: RunFile) -> str:
    """The base of deme.toml. Raises MissingError where there is none."""
    if not run.base.exists():
        raise MissingError(
            f"{run.base}: no base there; name a MODEL, or make a base with `deme split`"
        )
    return str(run.base)


def check_images(run: RunFile, data: str | None) -> DataConfig:
    """Which images are looked at, found before torch is imported."""
    from deme_cli.data.places import find_place

    images = run.settings(DataConfig, source=data)
    if not images.source:
        raise ConfigError("no images: set [data] source in deme.toml, or use --data")
    find_place(images.source)
    return images


def open_images_of(
    run: RunFile, record: DenoiserRecord, images: DataConfig, *, split: str, beside: Path,
    pipeline: str | None, device: str,
) -> tuple[DenoiserRecord, Examples]:  # fmt: skip
    """The images as a model of this record takes them, and the record with its frozen parts named.

    Their latents are cached in `beside` where the model has any.
    """
    from deme_cli.diffusion.companions import open_companions
    from deme_cli.diffusion.denoiser import choose_device
    from deme_cli.training.materials import name_companions, open_examples

    pipeline = run.pipeline(pipeline)
    record = name_companions(record, pipeline)
    companions = open_companions(record, pipeline=pipeline, device=str(choose_device(device)))
    cache = run.settings(FinetuneConfig).cache
    examples = open_examples(images, companions, split=split, cache=cache, beside=beside)
    fill_with_bar(examples)
    return record, examples


def open_model(argument: str, *, device: str) -> Denoiser:
    """The network that an argument names, on its device."""
    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.diffusion.denoiser import choose_device

    return open_denoiser(argument, device=str(choose_device(device)))


def watch(steps: Generator[Step | Result, None, None], label: str, total: int, unit: str) -> Result:
    """Show the steps of an analysis as a bar, its notes as lines; returns what it ends in.

    The analysis is closed whatever happens, so that its output is free again.
    """
    from deme_cli.analysis.unfinished import Step

    with contextlib.closing(steps), console.progress(label, total, unit) as bar:
        for step in steps:
            if not isinstance(step, Step):
                return step
            if step.note:
                bar.say(step.note)
            bar.advance(step.done)
    raise AssertionError("an analysis ends in what it found")


def write_analysis(
    output: Path, pictures: Sequence[Path], drawn: Sequence[bytes], document: bytes
) -> None:
    """The pictures, then the file, which says that all is done; what was kept goes."""
    from deme_cli.analysis.unfinished import discard

    for picture, one in zip(pictures, drawn, strict=True):
        write_whole(picture, [one])
    write_whole(output, [document])
    discard(output)
