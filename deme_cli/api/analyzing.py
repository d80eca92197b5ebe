"""What every analysis does: check its output, open its images, show its way, write all.

Each is a function in a file of its own, analyze_*.py. All of them check first what can be told from
headers and settings and say what they will measure; then they open the models, measure with a bar,
draw, and write. Stopped on the way, the same call goes on from what is kept beside its output.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deme_cli import console
from deme_cli.api.caching import fill_with_bar
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


@dataclass(frozen=True)
class Analysis:
    """What an analysis found: its file, the pictures of it, and in one sentence what it says.

    document: what the file holds.   facts: what `deme analyze … --json` tells of it.   Where
    nothing is written (a dry run, another process than the first), all but `path` is empty.
    """

    path: Path
    pictures: Sequence[Path]
    reading: str
    document: dict[str, Any]
    facts: dict[str, Any]

    @property
    def paths(self) -> list[Path]:
        """The files that were written."""
        return [self.path, *self.pictures] if self.document else []


def nothing_written(output: Path, **facts: Any) -> Analysis:
    return Analysis(output, [], "", {}, facts)


def check_output(output: Path, *, force: bool) -> None:
    """Check that the output is free or `force`; its pictures are drawn over."""
    from deme_cli.analysis.document import picture_paths

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


def check_images(images: DataConfig | None, run: RunFile, *, split: str) -> DataConfig:
    """Which images are looked at, those of `run` if None; found before torch is imported."""
    from deme_cli.data.places import find_place

    if split not in SPLITS:
        raise ConfigError(f"--split {split}: expected one of {', '.join(SPLITS)}")
    images = images or run.settings(DataConfig)
    if not images.source:
        raise ConfigError("no images: set [data] source in deme.toml, or use --data")
    find_place(images.source)
    return images


def cache_folder(model: str, output: Path) -> Path:
    """Where latents of images are cached: beside a model that is a file, else beside the output."""
    return Path(model).parent if Path(model).is_file() else output.parent


def open_images(
    record: DenoiserRecord, images: DataConfig, run: RunFile, *, split: str, beside: Path,
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
    output: Path, drawn: Sequence[bytes], document: bytes, shown: Sequence[str], **more: Any
) -> Analysis:
    """Write the pictures, then the file, which says that all is done; says the reading.

    What was kept of the analysis goes. `shown` of the document, and `more`, are its facts.
    """
    from deme_cli.analysis.document import picture_paths
    from deme_cli.analysis.unfinished import discard

    pictures, written = picture_paths(output), json.loads(document)
    for picture, one in zip(pictures, drawn, strict=True):
        write_whole(picture, [one])
    write_whole(output, [document])
    discard(output)
    console.note(written["reading"])
    facts = {name: written[name] for name in shown if name in written}
    return Analysis(output, pictures, written["reading"], written, {**facts, **more})
