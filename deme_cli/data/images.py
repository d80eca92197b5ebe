"""Images to train on and to compare with: one door for every place they may come from.

Images come out as uint8 (B, C, H, W); `to_unit` maps them to [-1, 1]. Sets of at most 2 GiB are
decoded once and kept, larger ones batch by batch. What an image shows, a caption or a class, comes
by the same number as the image.
B batch, C channels (1 grey, 3 colour), H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from deme_cli import console
from deme_cli.artifacts import load_tensors, read_record
from deme_cli.data.captions import Annotations, read_captions, read_labels
from deme_cli.data.digits import DIGIT_CAPTIONS, load_digits
from deme_cli.data.fitting import CENTRE, Shape, fit
from deme_cli.data.image_source import HELD_OUT_WORDS, ImageSource, find_image_source
from deme_cli.data.sources import (
    Images,
    array_images,
    folder_images,
    lmdb_images,
    npz_images,
    read_tables,
    table_images,
)
from deme_cli.errors import ArtifactError, ConfigError

SPLITS = ("train", "held-out", "all")
HELD_OUT_EVERY = 50
KEEP_BYTES = 2 << 30
_THREADED_PIXELS = 96 * 96  # below this, decoders hold the interpreter's lock most of the time


class ImageData:
    """Images of one shape, by number, and what they show.

    `fingerprint` names the whole source they were taken from, with its captions or classes where
    they were asked for. can_flip: whether a mirrored image is as good as the original.
    num_classes: of the whole source, and `classes` the names of those found, by number; None and
    none unless classes were asked for.
    """

    def __init__(
        self, images: Images, indices: Sequence[int], *, source: str, shape: Shape, can_flip: bool,
        annotations: Annotations, keep: bool = True, squeeze: bool = False,
    ) -> None:  # fmt: skip
        self._images, self._indices, self._annotations = images, indices, annotations
        self.squeeze = squeeze
        self.source, self.shape, self.can_flip = source, shape, can_flip
        self.fingerprint = annotations.fingerprint(images.fingerprint)
        self.num_classes, self.classes = annotations.num_classes, annotations.classes
        self._kept: Tensor | None = None
        if keep and len(self) * int(np.prod(shape)) <= KEEP_BYTES:
            self._kept = self._decode(range(len(self)))
        else:
            self._decode([0])

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Sequence[int], centering: Tensor | None = None) -> Tensor:
        """Images by their number in this set: uint8 (B, C, H, W).

        centering: (B, 2) in [0, 1], where each crop lies, x and y; None takes the centre.
        Raises ArtifactError naming a broken image.
        """
        if self._kept is not None and centering is None:
            return self._kept[torch.as_tensor(indices, dtype=torch.long)]
        return self._decode(indices, centering)

    def name(self, index: int) -> str:
        """An image as messages call it."""
        return self._images.name(self._indices[index])

    def file_names(self) -> Sequence[str] | None:
        """The names of images below their folder; None of images that are no files."""
        names = self._images.file_names
        return names and [names[index] for index in self._indices]

    def captions(self, indices: Sequence[int]) -> list[str]:
        """The captions of images; for data opened with wants="text"."""
        return [self._annotations.captions[self._indices[index]] for index in indices]

    def labels(self, indices: Sequence[int]) -> list[int]:
        """The classes of images, below `num_classes`; for data opened with wants="class"."""
        return [self._annotations.labels[self._indices[index]] for index in indices]

    def sizes(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """(height, width) of the original images, from their headers."""
        return [self._images.size(self._indices[index])[1:] for index in indices]

    def _decode(self, indices: Iterable[int], centering: Tensor | None = None) -> Tensor:
        """Read and fit images; in threads where they are large enough to gain by it."""
        chosen = [self._indices[index] for index in indices]
        out = np.empty((len(chosen), *self.shape), dtype=np.uint8)
        whole = None if self.squeeze else CENTRE
        crops = [whole] * len(chosen) if centering is None else list(map(tuple, centering.tolist()))

        def fill(place: int) -> None:
            out[place] = fit(self._images.decode(chosen[place]), self.shape, crops[place])

        _, height, width = self._images.size(chosen[0]) if chosen else self.shape
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            is_large = height * width >= _THREADED_PIXELS
            for _ in (pool.map if is_large else map)(fill, range(len(chosen))):
                pass
        return torch.from_numpy(out)


def open_images(
    source: str, *, shape: Shape | None, split: str = "train", wants: str = "nothing",
    captions: str | None = None, keep: bool = True, squeeze: bool = False,
) -> ImageData:  # fmt: skip
    """The images that an argument names, at `shape` (C, H, W); None keeps the size they share.

    A shape scales the short side, crops the centre and converts the channels; with `squeeze` it
    scales both sides and crops nothing.
    split: `held-out` is the test split where the source has one, else every 50th image (index % 50
    == 49, or the last), which `train` then leaves out; `all` is both.
    wants: `text` requires a caption of every image, `class` a class; captions: the column of either
    (None: the usual names). keep: hold the decoded images in memory where there is room.
    Raises MissingError, ArtifactError or ConfigError, naming the source or the broken image.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    located = find_image_source(source)
    images, indices = _open_split(located, split)
    if not indices:
        raise ArtifactError(f"{source}: too few images for the split {split!r}")
    annotations = Annotations()
    if wants == "text":
        annotations = read_captions(images.annotate(wants, captions), source, images.name)
    elif wants == "class":
        raw = images.annotate(wants, captions)
        annotations = read_labels(raw, source, images.name)
        shown = [name if name == str(number) else f"{number} {name}"
                 for number, name in sorted(annotations.classes.items())]  # fmt: skip
        listed = ", ".join(shown if len(shown) <= 12 else [*shown[:8], "…", *shown[-2:]])
        many = "es" * (len(shown) > 1)
        console.note_once(f"{source}: {len(shown)} class{many} by {raw.where}: {listed}")
    if annotations.repeats and split == "train":
        indices = [index for index in indices for _ in range(annotations.repeats[index])]
    return ImageData(
        images, indices, source=source, shape=shape or _own_shape(images, indices),
        can_flip=located.kind != "digits", annotations=annotations, keep=keep, squeeze=squeeze,
    )  # fmt: skip


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]: v / 127.5 - 1."""
    return images.float() / 127.5 - 1


def _open_split(source: ImageSource, split: str) -> tuple[Images, Sequence[int]]:
    """The images that hold a split, and the numbers of its images among them.

    Of a source without a split for testing, every 50th image is held out, or the last.
    """
    has_split = True
    if source.kind == "digits":
        digits, labels = load_digits({"held-out": "test"}.get(split, split))
        named = [DIGIT_CAPTIONS[label] for label in labels]
        images = array_images("digits", digits, captions=named, labels=labels, num_classes=10)
    elif source.kind in ("folder", "lmdb"):
        has_split = bool(source.held_out)
        wanted = {"train": (False,), "held-out": (True,), "all": (False, True)}[split]
        files = [f for f in source.files if not has_split or (f in source.held_out) in wanted]
        images = (folder_images if source.kind == "folder" else lmdb_images)(source, files)
    elif source.kind == "npz":
        has_split, images = False, npz_images(source)
    elif source.kind == "samples":
        has_split, images = False, _samples(source)
    else:
        from datasets import concatenate_datasets

        tables = read_tables(source)
        test = tables.keys() & set(HELD_OUT_WORDS)
        has_split = 0 < len(test) < len(tables)
        names = {"train": tables.keys() - test, "held-out": test}.get(split) if has_split else None
        rows = [table for name, table in tables.items() if names is None or name in names]
        splits = list(tables.values()) if has_split else []
        images = table_images(source.name, concatenate_datasets(rows), splits)
    count = images.count
    held_out = range(HELD_OUT_EVERY - 1, count, HELD_OUT_EVERY) or [count - 1]
    if has_split or split == "all":
        return images, range(count)
    return images, held_out if split == "held-out" else sorted({*range(count)} - {*held_out})


def _samples(source: ImageSource) -> Images:
    """The images of a samples artifact; the prompts they were drawn for are their captions."""
    record, images = read_record(source.path, "samples"), load_tensors(source.path).get("images")
    if images is None or images.dtype != torch.uint8 or images.shape[3:] not in ((1,), (3,)):
        raise ArtifactError(f"{source.name}: expected a uint8 tensor `images` (n, H, W, 1 or 3)")
    return array_images(source.name, images.numpy(), captions=record.prompts, labels=record.classes)


def _own_shape(images: Images, indices: Sequence[int]) -> Shape:
    """The size that all images share, grey if all are grey."""
    channels, height, width = images.size(indices[0])
    for index in indices[1:]:
        own_channels, own_height, own_width = images.size(index)
        if (own_height, own_width) != (height, width):
            raise ArtifactError(
                f"{images.name(index)} is {own_width}x{own_height}, {images.name(indices[0])} "
                f"{width}x{height}; give images of one size"
            )
        channels = max(channels, own_channels)
    return channels, height, width
