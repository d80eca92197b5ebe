"""Where encoded images lie: an array, a folder, rows of a table. Nothing here resizes.

A source has images by number, a name for each (for messages), a fingerprint, and the captions or
classes that lie with them. EXIF orientation is applied here; levels and shape are fitting.py's.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deme_cli import console
from deme_cli.data.captions import (
    NoAnnotations,
    RawAnnotations,
    folder_annotations,
)
from deme_cli.data.digests import file_digests, remembered, stamp
from deme_cli.data.fitting import is_grey, to_srgb
from deme_cli.data.image_source import ImageSource
from deme_cli.data.tables import table_annotations
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.fetch import sha256_of

if TYPE_CHECKING:
    from datasets import Dataset

_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 turn the image by a quarter


class Images(ABC):
    """Numbered images that are decoded one at a time. label: what messages call them all."""

    label: str
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The image as messages call it."""

    @abstractmethod
    def encoded(self, index: int) -> Path | io.BytesIO:
        """The file of the image, or its bytes."""

    @abstractmethod
    def annotations(self, wants: str, column: str | None) -> RawAnnotations:
        """Captions (wants `text`) or classes (wants `class`). Raises ArtifactError without any."""

    def decode(self, index: int) -> Image.Image:
        """The image in L or RGB, upright. Raises ArtifactError naming it if it is broken."""
        name = self.name(index)
        with self._open(index) as image:
            image.load()
            upright, told = to_srgb(ImageOps.exif_transpose(image), name, image.format)
        for text in told:
            console.note_once(f"{self.label}: {text}", f"; the first is {name}")
        return upright

    def size(self, index: int) -> tuple[int, int, int]:
        """(C, H, W) from the image's header, C = 1 for grey and 3 for anything else."""
        with self._open(index) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION, 1) >= 5:
                width, height = height, width
            return 1 if is_grey(image) else 3, height, width

    @contextmanager
    def _open(self, index: int) -> Iterator[Image.Image]:
        """The image, open; what goes wrong while it is read is told by its name."""
        name = self.name(index)
        try:
            with Image.open(self.encoded(index)) as image:
                yield image
        except FileNotFoundError as error:
            raise MissingError(f"{name}: no such file") from error
        except PermissionError as error:
            raise MissingError(f"{name}: no permission to read it") from error
        except UnidentifiedImageError as error:
            raise ArtifactError(f"{name}: not a readable image; remove or mend it") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ArtifactError(f"{name}: broken image ({error}); remove or mend it") from error


class ArrayImages(Images):
    """uint8 images (n, H, W, C) with C = 1 or 3; the fingerprint is of their bytes and shape.

    captions, labels: one per image, where they are known; labels are below `num_classes`.
    """

    def __init__(
        self, label: str, images: np.ndarray, *, captions: Sequence[str] | None = None,
        labels: Sequence[int] | None = None, num_classes: int = 0,
    ) -> None:  # fmt: skip
        self.label, self.images = label, np.ascontiguousarray(images)
        self._known, self._num_classes = {"text": captions, "class": labels}, num_classes
        digest = hashlib.sha256(f"{images.shape}\n".encode())
        digest.update(self.images.data.cast("B"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.label}: image {index}"

    def encoded(self, index: int) -> io.BytesIO:
        raise NotImplementedError("an array is not encoded")

    def decode(self, index: int) -> Image.Image:
        image = self.images[index]
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)

    def size(self, index: int) -> tuple[int, int, int]:
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    def annotations(self, wants: str, column: str | None) -> RawAnnotations:
        values, what = self._known[wants], "captions" if wants == "text" else "classes"
        if values is None or len(values) != len(self) or column is not None:
            missing = f"no column {column!r}" if column else f"no {what}, one for each image"
            raise NoAnnotations(
                f"{self.label}: {missing}; give images with {what}: a folder with metadata.jsonl, "
                f"a parquet file or webdataset shards"
            )
        return RawAnnotations(values, self.label, names=[*map(str, range(self._num_classes))])


class FolderImages(Images):
    """Image files under a folder; the fingerprint is of their names and bytes."""

    def __init__(self, source: ImageSource, paths: Sequence[Path]) -> None:
        self.label, self._source, self.paths = source.name, source, paths
        digests = file_digests(source.path, self.paths)
        self.fingerprint = _fingerprint(map("\0".join, digests.items()))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def encoded(self, index: int) -> Path:
        return self.paths[index]

    def annotations(self, wants: str, column: str | None) -> RawAnnotations:
        return folder_annotations(self._source, self.paths, wants=wants, column=column)

    def file_names(self) -> list[str]:
        """Below the folder."""
        return [path.relative_to(self._source.path).as_posix() for path in self.paths]


class TableImages(Images):
    """The image column of a table; the fingerprint is of the bytes of its encoded images.

    splits: the tables of all splits, where `rows` are some of them.
    """

    def __init__(self, label: str, rows: Dataset, splits: Sequence[Dataset] = ()) -> None:
        from datasets import Image as ImageFeature

        self.label, self.column = label, _image_column(label, rows)
        self._table, self._splits = rows, splits
        self.rows = rows.select_columns([self.column]).cast_column(
            self.column, ImageFeature(decode=False)
        )
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.label}: row {index}"

    def encoded(self, index: int) -> Path | io.BytesIO:
        value = self.rows[index][self.column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ArtifactError(f"{self.name(index)} holds no image; leave such rows out")
        return Path(value["path"]) if value["bytes"] is None else io.BytesIO(value["bytes"])

    def annotations(self, wants: str, column: str | None) -> RawAnnotations:
        return table_annotations(self.label, self._table, self._splits, wants=wants, column=column)

    def _fingerprint(self) -> str:
        """Of all rows, remembered for the files that `datasets` keeps them in."""
        files = [Path(file["filename"]) for file in self.rows.cache_files]
        if not files:
            return _fingerprint(self._digests())
        name = "\0".join([files[0].name, self.column, str(len(self))])
        stamps = {name: stamp(files)}
        return remembered(files[0].parent, stamps, lambda _: _fingerprint(self._digests()))[0]

    def _digests(self) -> Iterator[str]:
        """SHA-256 of each row's encoded image; none is decoded.

        Raises ArtifactError for a row that names a file which did not come with the table.
        """
        import pyarrow.compute

        index = 0
        for batch in self.rows.with_format("arrow").iter(batch_size=1_000):
            images = batch.column(self.column).combine_chunks()
            parts = (pyarrow.compute.struct_field(images, part) for part in ("bytes", "path"))
            for value, path in zip(*parts, strict=True):
                if value.is_valid:
                    yield hashlib.sha256(value.as_buffer()).hexdigest()
                elif not path.is_valid:
                    yield "None"
                elif _is_fetched(path.as_py()):
                    yield sha256_of(Path(path.as_py()))
                else:
                    raise ArtifactError(
                        f"{self.name(index)} names a file, {path.as_py()!r}, instead of holding "
                        f"an image; write the table anew with the images' bytes in it, or give "
                        f"the folder of images"
                    )
                index += 1


def _is_fetched(path: str) -> bool:
    """Whether a file lies where `datasets` puts what it fetches: the images of a hub's folder."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    names = ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH")
    caches = [HF_HUB_CACHE, *(getattr(datasets.config, name) for name in names)]
    real = os.path.realpath(path.replace("\0", ""))
    return any(Path(real).is_relative_to(os.path.realpath(cache)) for cache in caches)


def _image_column(label: str, rows: Dataset) -> str:
    """The column that holds images: declared so, or bytes that `datasets` can read as images."""
    from datasets import Image as ImageFeature

    declared = [name for name, kind in rows.features.items() if isinstance(kind, ImageFeature)]
    candidates = declared or [n for n, kind in rows.features.items() if _holds_bytes(kind)]
    for name in ("image", "img", *candidates):
        if name in candidates:
            return name
    raise ArtifactError(f"{label}: no column holds images; columns: {', '.join(rows.features)}")


def _holds_bytes(kind: object) -> bool:
    if isinstance(kind, dict):
        return set(kind) == {"bytes", "path"}
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _fingerprint(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))  # of names of files, too
    return digest.hexdigest()
