"""Where images are kept: one `samples` artifact, or a folder of PNG files, 000000.png and on.

Both keep what is finished, so that the same command goes on where it stopped, after Ctrl-C, a
signal or a crash; and nothing is kept that another protocol drew. The artifact grows as a hidden
file beside its place: one line of JSON with the protocol card, then the raw uint8 images; at its
end it is written whole from that, so for a moment the images lie on the disk twice. In a folder the
PNG files are the state and `samples.json` holds the card; images that have prompts or classes get
`metadata.jsonl`, by the imagefolder convention, so that the folder can be trained on.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from deme_cli.artifacts import ArtifactWriter, SamplesRecord
from deme_cli.data.image_source import image_suffixes
from deme_cli.errors import ConfigError, writing
from deme_cli.files import TensorSpec, require_output, require_space, write_whole
from deme_cli.jobs import claim
from deme_cli.run_folder import CARD_NAME

METADATA_NAME = "metadata.jsonl"
PREVIEWED = 64  # images in a preview
_NUMBERED = re.compile(r"\d{6,}\.png")
_PIECE_BYTES = 1 << 24
_GAP = 2  # pixels between the images of a preview
_LEAST_WIDTH, _MOST_WIDTH = 256, 2048  # of a preview


@dataclass(frozen=True)
class Samples:
    """Images of `shape`, one for each of `seeds`, drawn under the protocol `card`, kept at `path`.

    `prompts` and `classes`, where images have them, are kept beside: one per image.
    """

    path: Path
    card: dict[str, Any]
    shape: tuple[int, int, int]  # (H, W, C)
    seeds: list[int]
    batch_size: int
    force: bool = False
    prompts: list[str] | None = None
    classes: list[int] | None = None

    @property
    def num(self) -> int:
        return len(self.seeds)

    @property
    def image_bytes(self) -> int:
        return math.prod(self.shape)

    def kept(self, num_images: int) -> int:
        """Of `num_images` there, how many need not be drawn again: all, or whole batches.

        Whole batches, because then a resumed run equals an uninterrupted one bit for bit.
        """
        if num_images >= self.num:
            return self.num
        return num_images // self.batch_size * self.batch_size

    def require_same(self, card: Mapping[str, Any], where: Path) -> None:
        """Check that the card at `where` promises these images, however many of them."""
        if (name := first_difference(self.card, card)) is not None:
            raise ConfigError(
                f"{where}: holds images with {name} = {card.get(name)}, this run has "
                f"{self.card.get(name)}; run the command that began it, choose another --output, "
                f"or add --force to discard them"
            )


def first_difference(card: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first field in which two cards promise different images, or None.

    How many images there are, what the model was imported from and where prompts lie are left out.
    """
    for name in [*card, *other]:
        if name not in ("num", "source", "prompts") and card.get(name) != other.get(name):
            return name
    return None


def is_folder(path: Path) -> bool:
    """Whether an output means a folder of PNG files: it is one, or has no .safetensors suffix."""
    with writing(path):
        return path.is_dir() or path.suffix != ".safetensors"


def open_store(samples: Samples) -> AbstractContextManager[SamplesFolder | SamplesFile]:
    """What collects images; those before its `first` are there. Add the others, then finish.

    Raises ConfigError if the output is finished, is being written, or holds images of another
    protocol, unless `force`; and for a folder of images that deme did not number, always.
    """
    return _open_folder(samples) if is_folder(samples.path) else _open_file(samples)


def _card_in(text: bytes) -> dict[str, Any] | None:
    """The protocol card in JSON that lies beside images; None where there is no whole one."""
    try:
        card = json.loads(text)["protocol"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return card if isinstance(card, dict) else None


@contextmanager
def _open_file(samples: Samples) -> Iterator[SamplesFile]:
    require_output(samples.path, force=samples.force)
    unfinished = samples.path.parent / f".{samples.path.name}.unfinished"
    with claim(unfinished):
        line, first = json.dumps({"protocol": samples.card}).encode() + b"\n", 0
        with writing(unfinished):
            file = unfinished.open("r+b" if unfinished.exists() else "w+b")
        try:
            kept = file.readline(1 << 20)
            card = _card_in(kept) if kept.endswith(b"\n") else None  # else a crash cut it short
            if card is not None and not (samples.force and first_difference(samples.card, card)):
                line = kept
                samples.require_same(card, unfinished)
                first = samples.kept((file.seek(0, 2) - len(line)) // samples.image_bytes)
            require_space(samples.path, (2 * samples.num - first) * samples.image_bytes)
            with writing(unfinished):
                file.seek(0)
                file.write(line)
                file.truncate(len(line) + first * samples.image_bytes)
            yield SamplesFile(samples, first, file, len(line))
            file.close()
            unfinished.unlink()
        finally:
            with suppress(OSError):  # a full disk: what was flushed is kept
                file.close()
            if unfinished.exists() and unfinished.stat().st_size <= len(line):
                unfinished.unlink()  # holds no image yet


class SamplesFile:
    """Images on their way into an artifact, in a file after `begin` bytes."""

    def __init__(self, samples: Samples, first: int, file: BinaryIO, begin: int) -> None:
        self.samples, self.first, self._file, self._begin = samples, first, file, begin

    def add(self, images: np.ndarray) -> None:
        """Append the next images, uint8 (B, H, W, C); they are kept from here on."""
        with writing(self.samples.path):
            self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(images).data)
            self._file.flush()

    def head(self, num: int) -> np.ndarray:
        """The first `num` images, uint8 (num, H, W, C)."""
        self._file.seek(self._begin)
        data = self._file.read(min(num, self.samples.num) * self.samples.image_bytes)
        return np.frombuffer(data, np.uint8).reshape(-1, *self.samples.shape)

    def finish(self) -> None:
        """Write the artifact whole."""
        samples = self.samples
        layout = [
            TensorSpec("seeds", "I64", (samples.num,)),
            TensorSpec("images", "U8", (samples.num, *samples.shape)),
        ]
        record = SamplesRecord(
            protocol=samples.card, prompts=samples.prompts, classes=samples.classes
        )
        with ArtifactWriter(samples.path, layout, record) as writer:
            writer.write(np.array(samples.seeds, dtype="<i8").data)
            self._file.seek(self._begin)
            while piece := self._file.read(_PIECE_BYTES):
                writer.write(piece)


@contextmanager
def _open_folder(samples: Samples) -> Iterator[SamplesFolder]:
    card_path = samples.path / CARD_NAME
    with claim(card_path):
        first = _make_room(samples)
        require_space(samples.path, (samples.num - first) * samples.image_bytes)
        text = json.dumps({"schema_version": 1, "protocol": samples.card}, indent=2)
        write_whole(card_path, text + "\n")
        try:
            yield SamplesFolder(samples, first)
        except BaseException:
            if not _numbered(samples.path):
                card_path.unlink(missing_ok=True)  # promises images of which there is none
            raise


def _make_room(samples: Samples) -> int:
    """How many images that are there are kept; those that are to be replaced are gone."""
    folder, paths = samples.path, _numbered(samples.path)
    if not paths:
        return 0
    card = _card_in((folder / CARD_NAME).read_bytes()) if (folder / CARD_NAME).is_file() else None
    in_turn = (int(path.stem) == index and _is_readable(path) for index, path in enumerate(paths))
    whole = next((index for index, is_kept in enumerate(in_turn) if not is_kept), len(paths))
    is_unfinished = whole < samples.num and card and first_difference(samples.card, card) is None
    if samples.force and not is_unfinished:
        for path in (*paths, folder / METADATA_NAME):  # which spoke of them
            path.unlink(missing_ok=True)
        return 0
    if card is None:
        raise ConfigError(
            f"{folder}: holds images without {CARD_NAME}; choose another --output, or add --force "
            f"to replace them"
        )
    samples.require_same(card, folder)
    if whole >= samples.num or int(paths[-1].stem) >= samples.num:
        raise ConfigError(
            f"{folder} exists with {len(paths)} images; add --force to replace them, or choose "
            f"another --output"
        )
    return samples.kept(whole)


def _numbered(folder: Path) -> list[Path]:
    """The PNG files with a number for a name; other images in the folder are refused."""
    images = [path for path in folder.iterdir() if path.suffix.lower() in image_suffixes()]
    for path in images:
        if not _NUMBERED.fullmatch(path.name):
            raise ConfigError(f"{path}: not drawn by deme; choose another --output")
    return sorted(images, key=lambda path: int(path.stem))


def _is_readable(path: Path) -> bool:
    """Whether it is whole: a crash may have broken it, and then it is drawn again."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # what Pillow raises for a PNG cut short
        return False
    return True


class SamplesFolder:
    """Images on their way into a folder of PNG files."""

    def __init__(self, samples: Samples, first: int) -> None:
        self.samples, self.first, self._num = samples, first, first

    def add(self, images: np.ndarray) -> None:
        """Write the next images, uint8 (B, H, W, C); they are kept from here on."""
        for image in images:
            path = self._path(self._num)
            partial = path.with_suffix(".partial")
            try:
                with writing(path):  # not synced to the disk: a broken one is drawn again
                    partial.write_bytes(_png(image))
                    os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            self._num += 1

    def head(self, num: int) -> np.ndarray:
        """The first `num` images, uint8 (num, H, W, C)."""
        paths = map(self._path, range(min(num, self.samples.num)))
        images = [np.asarray(Image.open(path)) for path in paths]
        return np.stack(images).reshape(-1, *self.samples.shape)

    def finish(self) -> None:
        """Every image is in its place; write down what each shows."""
        samples = self.samples
        shown = {"text": samples.prompts, "label": samples.classes}
        shown = {name: column for name, column in shown.items() if column is not None}
        if shown:
            names = [self._path(index).name for index in range(samples.num)]
            columns: dict[str, Any] = {"file_name": names, **shown, "seed": samples.seeds}
            rows = zip(*columns.values(), strict=True)
            lines = (json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
            write_whole(samples.path / METADATA_NAME, map(str.encode, lines))

    def _path(self, index: int) -> Path:
        return self.samples.path / f"{index:06d}.png"


def preview_path(output: Path) -> Path:
    """`ensemble.png` for `ensemble.safetensors`, `images.png` beside the folder `images`."""
    stem = output.stem if output.suffix == ".safetensors" else Path(os.path.realpath(output)).name
    return output.parent / f"{stem}.png"


def write_preview(path: Path, images: np.ndarray) -> None:
    """Write images, uint8 (n, H, W, C), side by side as one PNG file."""
    write_whole(path, _png(grid(images)))


def grid(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, C) side by side, (H', W', C): small ones enlarged, those too wide reduced.

    A gap lies around each; what a row lacks stays white.
    """
    num, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(num))
    if (side := math.ceil(columns * width / _MOST_WIDTH)) > 1:  # to the means of squares
        height, width = height // side, width // side
        squares = images[:, : height * side, : width * side]
        squares = squares.reshape(num, height, side, width, side, channels)
        images = squares.mean((2, 4)).round().astype(np.uint8)
    scale = max(1, math.ceil((_LEAST_WIDTH - _GAP * (columns + 1)) / (columns * width)))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    around = [(0, -num % columns), (_GAP, 0), (_GAP, 0), (0, 0)]
    images = np.pad(images, around, constant_values=255)
    _, height, width, _ = images.shape
    sheet = images.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(-1, columns * width, channels)
    return np.pad(sheet, [(0, _GAP), (0, _GAP), (0, 0)], constant_values=255)


def _png(image: np.ndarray) -> bytes:
    """One image (H, W, C) uint8, C of 1 or 3, as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()
