"""Images as a folder of PNG files, 000000.png and on, that can be resumed and extended.

`samples.json` holds the protocol card; the PNG files themselves are the state. A file appears whole
or not at all, and on resuming each is read back, so that one a crash broke is drawn again. Images
that have prompts or classes get `metadata.jsonl` at the end, by the imagefolder convention, so that
the folder can be trained on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deme_cli.data.image_source import image_suffixes
from deme_cli.errors import ConfigError, writing
from deme_cli.files import require_space, write_whole
from deme_cli.jobs import claim
from deme_cli.sampling.preview import png_bytes
from deme_cli.sampling.sampler import image_seed
from deme_cli.sampling.store import Order, card_in

CARD_NAME = "samples.json"
METADATA_NAME = "metadata.jsonl"
_NUMBERED = re.compile(r"\d{6,}\.png")


@contextmanager
def open_samples_folder(order: Order) -> Iterator[SamplesFolder]:
    """The folder of an order; one with fewer images than ordered is extended.

    Raises ConfigError if it is finished, is being written, or holds images of another protocol,
    unless the order says `force`; and if it holds images that deme did not number, always.
    """
    card_path = order.path / CARD_NAME
    with claim(card_path):
        first = _make_room(order)
        require_space(order.path, (order.num - first) * order.image_bytes)
        text = json.dumps({"schema_version": 1, "protocol": order.card}, indent=2)
        write_whole(card_path, [text.encode(), b"\n"])
        try:
            yield SamplesFolder(order, first)
        except BaseException:
            if not _numbered(order.path):
                card_path.unlink(missing_ok=True)  # promises images of which there is none
            raise


def _make_room(order: Order) -> int:
    """How many images that are there are kept; those that are to be replaced are gone."""
    found = _numbered(order.path)
    if not found:
        return 0
    card, whole = _read_card(order.path), _whole_images(found)
    if order.force and (whole >= order.num or not card or not order.is_same(card)):
        for path in found:
            path.unlink()
        (order.path / METADATA_NAME).unlink(missing_ok=True)  # it spoke of them
        return 0
    _require_unfinished(order, found, card, whole)
    return order.kept(whole)


def _numbered(folder: Path) -> list[Path]:
    """The PNG files with a number for a name; other images in the folder are refused."""
    images = [path for path in folder.iterdir() if path.suffix.lower() in image_suffixes()]
    for path in images:
        if not _NUMBERED.fullmatch(path.name):
            raise ConfigError(f"{path}: not drawn by deme; choose another --output")
    return sorted(images, key=lambda path: int(path.stem))


def _read_card(folder: Path) -> dict[str, Any] | None:
    try:
        return card_in((folder / CARD_NAME).read_bytes())
    except OSError:
        return None


def _require_unfinished(
    order: Order, found: list[Path], card: dict[str, Any] | None, whole: int
) -> None:
    """Check that the images found are the beginning of this order."""
    if card is None:
        raise ConfigError(
            f"{order.path}: holds images without {CARD_NAME}; choose another --output, or add "
            f"--force to replace them"
        )
    order.require_same(card, order.path)
    if whole >= order.num or int(found[-1].stem) >= order.num:
        raise ConfigError(
            f"{order.path} exists with {len(found)} images; add --force to replace them, or choose "
            f"another --output"
        )


def _whole_images(paths: list[Path]) -> int:
    """How many images from 000000.png on are there without a gap and can be read."""
    for index, path in enumerate(paths):
        if int(path.stem) != index or not _is_readable(path):
            return index
    return len(paths)


def _is_readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # what Pillow raises for a PNG cut short
        return False
    return True


class SamplesFolder:
    """Collects the images of one order: those before `first` are there. Add the others, finish."""

    def __init__(self, order: Order, first: int) -> None:
        self.order, self.first = order, first
        self._num = first

    def add(self, images: np.ndarray) -> None:
        """Write the next images, uint8 (B, H, W, C); they are kept from here on."""
        for image in images:
            path = self._path(self._num)
            partial = path.with_suffix(".partial")
            try:
                with writing(path):
                    partial.write_bytes(png_bytes(image))
                    os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            self._num += 1

    def head(self, num: int) -> np.ndarray:
        """The first `num` images, uint8 (num, H, W, C)."""
        paths = [self._path(index) for index in range(min(num, self.order.num))]
        images = [np.asarray(Image.open(path)) for path in paths]
        return np.stack(images).reshape(-1, *self.order.shape)

    def finish(self) -> Path:
        """Every image is in its place; write down what each shows."""
        order = self.order
        if order.prompts is not None or order.classes is not None:
            rows = (json.dumps(row) + "\n" for row in self._rows())
            write_whole(order.path / METADATA_NAME, (row.encode() for row in rows))
        return order.path

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Image file, prompt, class and seed of every image."""
        order = self.order
        for index in range(order.num):
            row: dict[str, Any] = {"file_name": self._path(index).name}
            if order.prompts is not None:
                row["text"] = order.prompts[index]
            if order.classes is not None:
                row["label"] = order.classes[index]
            yield {**row, "seed": image_seed(order.card["seed"], index)}

    def _path(self, index: int) -> Path:
        return self.order.path / f"{index:06d}.png"
