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
    from deme_cli.records import DenoiserRecord
    from deme_cli.training.examples import Examples

Result = TypeVar("Result")
SPLITS = ("train", "held-out")
Data = Annotated[str | None, option(DataConfig, "source", "--data")]
Output = Annotated[Path, typer.Option("--output", "-o", help="JSON file; pictures go beside it.")]


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


def check_output(output: Path, *, force: bool) -> None:
    """Check that the output is free or `force`; its pictures are drawn over."""
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: expected a name that ends in .json")
    require_output(output, force=force)
    for picture in picture_paths(output):
        require_output(picture, force=True)


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


def open_images(
    run: RunFile, record: DenoiserRecord, images: DataConfig, *, split: str, beside: Path,
    pipeline: str | None, device: str,
) -> tuple[DenoiserRecord, Examples]:  # fmt: skip
    """See `open_images_of`; in the settings of `run`, with a bar where latents are cached."""
    from deme_cli.analysis.draws import open_images_of
    from deme_cli.diffusion.denoiser import choose_device

    record, examples = open_images_of(
        record, images, split=split, cache=run.settings(FinetuneConfig).cache, beside=beside,
        pipeline=run.pipeline(pipeline), device=str(choose_device(device)),
    )  # fmt: skip
    fill_with_bar(examples)
    return record, examples


def watch(steps: Generator[Step | Result], label: str, total: int, unit: str) -> Result:
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
    output: Path, drawn: Sequence[bytes], document: bytes, reading: str
) -> list[Path]:
    """Write the pictures, then the file, which says that all is done; says the reading.

    What was kept of the analysis goes. Returns the paths.
    """
    from deme_cli.analysis.unfinished import discard

    pictures = picture_paths(output)
    for picture, one in zip(pictures, drawn, strict=True):
        write_whole(picture, [one])
    write_whole(output, [document])
    discard(output)
    console.note(reading)
    return [output, *pictures]
