"""Images as one `samples` artifact that grows batch by batch and can be resumed.

Until it is whole, it is a hidden file beside its place: one line of JSON with the protocol card,
then the raw uint8 images one after another. What a crash leaves is cut to whole batches. At the end
the artifact is written from it, so for a moment the images lie on the disk twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deme_cli.artifacts import ArtifactWriter, SamplesRecord
from deme_cli.errors import writing
from deme_cli.files import TensorSpec, require_output, require_space
from deme_cli.jobs import claim
from deme_cli.sampling.sampler import image_seed
from deme_cli.sampling.store import Order, card_in

_PIECE_BYTES = 1 << 24


@contextmanager
def open_samples_file(order: Order) -> Iterator[SamplesFile]:
    """The unfinished file of an order, which stays if this ends before its artifact is written.

    Raises ConfigError if the artifact exists, is being written, or an unfinished one has another
    protocol, unless the order says `force`.
    """
    require_output(order.path, force=order.force)
    unfinished = order.path.parent / f".{order.path.name}.unfinished"
    with claim(unfinished):
        line, first = _find_images(order, unfinished)
        require_space(order.path, (2 * order.num - first) * order.image_bytes)
        with writing(unfinished):
            file = unfinished.open("r+b" if first else "w+b")
            if not first:
                file.write(line)
            file.truncate(len(line) + first * order.image_bytes)
        try:
            yield SamplesFile(order, first, unfinished, file, begin=len(line))
        finally:
            with suppress(OSError):  # a full disk: what was flushed is kept
                file.close()
            if unfinished.exists() and unfinished.stat().st_size <= len(line):
                unfinished.unlink()  # holds no image yet


def _find_images(order: Order, unfinished: Path) -> tuple[bytes, int]:
    """The line that the unfinished file begins with, and how many images after it are kept."""
    anew = json.dumps({"protocol": order.card}).encode() + b"\n", 0
    if not unfinished.exists():
        return anew
    with unfinished.open("rb") as file:
        line = file.readline(1 << 20)
        num_bytes = file.seek(0, 2) - len(line)
    card = card_in(line) if line.endswith(b"\n") else None  # else a crash cut it short
    if card is None or (order.force and not order.is_same(card)):
        return anew
    order.require_same(card, unfinished)
    return line, order.kept(num_bytes // order.image_bytes)


class SamplesFile:
    """Collects the images of one order: those before `first` are there. Add the others, finish."""

    def __init__(
        self, order: Order, first: int, unfinished: Path, file: BinaryIO, *, begin: int
    ) -> None:
        self.order, self.first = order, first
        self._unfinished, self._file, self._begin = unfinished, file, begin

    def add(self, images: np.ndarray) -> None:
        """Append the next images, uint8 (B, H, W, C); they are kept from here on."""
        with writing(self.order.path):
            self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(images).data)
            self._file.flush()

    def head(self, num: int) -> np.ndarray:
        """The first `num` images, uint8 (num, H, W, C)."""
        self._file.seek(self._begin)
        data = self._file.read(min(num, self.order.num) * self.order.image_bytes)
        return np.frombuffer(data, np.uint8).reshape(-1, *self.order.shape)

    def finish(self) -> Path:
        """Write the artifact whole and let the unfinished file go."""
        order = self.order
        layout = [
            TensorSpec("seeds", "I64", (order.num,)),
            TensorSpec("images", "U8", (order.num, *order.shape)),
        ]
        seeds = [image_seed(order.card["seed"], index) for index in range(order.num)]
        record = SamplesRecord(protocol=order.card, prompts=order.prompts, classes=order.classes)
        with ArtifactWriter(order.path, layout, record) as writer:
            writer.write(np.array(seeds, dtype="<i8").data)
            for piece in self._pieces():
                writer.write(piece)
        self._file.close()
        self._unfinished.unlink(missing_ok=True)
        return order.path

    def _pieces(self) -> Iterator[bytes]:
        self._file.seek(self._begin)
        left = self.order.num * self.order.image_bytes
        while left:
            piece = self._file.read(min(left, _PIECE_BYTES))
            yield piece
            left -= len(piece)
