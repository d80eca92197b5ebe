"""Images as one `samples` artifact that grows batch by batch and can be resumed.

Until it is whole, it is a hidden file beside its place: one line of JSON with the protocol card,
then the raw uint8 images one after another. What a crash leaves is cut to whole batches. At the end
the artifact is written from it, so for a moment the images lie on the disk twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from deme_cli.artifacts import ArtifactWriter
from deme_cli.errors import writing
from deme_cli.outputs import claim, require_output, require_space
from deme_cli.records import SamplesRecord
from deme_cli.sampling.sampler import ImageBatch, image_seed
from deme_cli.sampling.store import Order
from deme_cli.tensor_file import TensorSpec

_PIECE_BYTES = 1 << 24


class SamplesFile:
    """Collects the images of one order. Enter it, add batches from `first` on, then finish.

    Raises ConfigError if the artifact exists, is being written, or an unfinished one has another
    protocol, unless the order says `force`.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.unfinished = order.path.parent / f".{order.path.name}.unfinished"
        self._line = json.dumps({"protocol": order.card}).encode() + b"\n"
        self.first = 0

    def __enter__(self) -> SamplesFile:
        order = self.order
        require_output(order.path, force=order.force)
        self._claim = claim(self.unfinished)
        self._claim.__enter__()
        try:
            self.first = order.kept(self._find_images())
            left = order.num - self.first
            require_space(order.path, (left + order.num) * order.image_bytes)
            self._open()
        except BaseException:
            self._claim.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # a full disk: what was flushed is kept
            self._file.close()
        if self.unfinished.exists() and self.unfinished.stat().st_size <= len(self._line):
            self.unfinished.unlink()  # holds no image yet
        self._claim.__exit__(None, None, None)

    def _find_images(self) -> int:
        """Whole images in the unfinished file, whose header is then known to promise the same."""
        if not self.unfinished.exists():
            return 0
        with self.unfinished.open("rb") as file:
            line = file.readline(1 << 20)
            file.seek(0, 2)
            num_bytes = file.tell() - len(line)
        card = _parse_card(line)
        if card is None or (self.order.force and not self.order.is_same(card)):
            return 0
        self.order.require_same(card, self.unfinished)
        self._line = line
        return num_bytes // self.order.image_bytes

    def _open(self) -> None:
        """Open the unfinished file for the images that follow, cut to those kept."""
        with writing(self.unfinished):
            self._file = self.unfinished.open("r+b" if self.first else "w+b")
            if not self.first:
                self._file.write(self._line)
            self._file.truncate(len(self._line) + self.first * self.order.image_bytes)
            self._file.seek(0, 2)

    def add(self, batch: ImageBatch) -> None:
        """Append the next images; they are kept from here on."""
        with writing(self.order.path):
            self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(batch.images).data)
            self._file.flush()

    def head(self, num: int) -> np.ndarray:
        """The first `num` images, uint8 (num, H, W, C)."""
        self._file.seek(len(self._line))
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
        self.unfinished.unlink(missing_ok=True)
        return order.path

    def _pieces(self) -> Iterator[bytes]:
        self._file.seek(len(self._line))
        left = self.order.num * self.order.image_bytes
        while left:
            piece = self._file.read(min(left, _PIECE_BYTES))
            yield piece
            left -= len(piece)


def _parse_card(line: bytes) -> dict[str, Any] | None:
    """The card in the first line of an unfinished file, or None if a crash cut the line short."""
    try:
        return json.loads(line)["protocol"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
