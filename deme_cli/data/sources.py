"""Where encoded images lie: an array, a folder, an archive, rows of a table. Nothing resizes here.

A source has images by number, a name for each (for messages), a fingerprint, and the captions or
classes that lie with them. EXIF orientation is applied here; levels and shape are fitting.py's.
Tables are parquet files, shards of webdataset and datasets of the hub, read by `datasets`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deme_cli import console
from deme_cli.data import archives
from deme_cli.data.captions import (
    COLUMNS,
    JSON_FIELDS,
    NoAnnotations,
    RawAnnotations,
    folder_annotations,
)
from deme_cli.data.fitting import Shape, is_grey, to_srgb
from deme_cli.data.image_source import (
    ImageSource,
    file_digests,
    image_suffixes,
    is_held_out,
    remembered,
)
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.fetch import offline_reason, sha256_of, stay_offline

if TYPE_CHECKING:
    from datasets import Dataset

_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 turn the image by a quarter
_FIELDS = ("txt", "json", "cls")  # of a sample in a shard


@dataclass(frozen=True)
class Images:
    """Numbered images that are decoded one at a time. label: what messages call them all.

    encoded: the file of an image, its bytes, or itself.   name: an image as messages call it.
    annotate: captions (wants `text`) or classes (wants `class`), of a column where one is named;
    raises ArtifactError without any.   file_names: below their folder, of images that are files.
    shape: (C, H, W) of all, of arrays.
    """

    label: str
    count: int
    fingerprint: str
    name: Callable[[int], str]
    encoded: Callable[[int], Path | io.BytesIO | Image.Image]
    annotate: Callable[[str, str | None], RawAnnotations]
    file_names: Sequence[str] | None = None
    shape: Shape | None = None

    def decode(self, index: int) -> Image.Image:
        """The image in L or RGB, upright. Raises ArtifactError naming it if it is broken."""
        name, encoded = self.name(index), self.encoded(index)
        if isinstance(encoded, Image.Image):
            return encoded
        with _open(name, encoded) as image:
            image.load()
            upright, told = to_srgb(ImageOps.exif_transpose(image), name, image.format)
        for text in told:
            console.note_once(f"{self.label}: {text}", f"; the first is {name}")
        return upright

    def size(self, index: int) -> tuple[int, int, int]:
        """(C, H, W) from the image's header, C = 1 for grey and 3 for anything else."""
        if self.shape is not None:
            return self.shape
        with _open(self.name(index), self.encoded(index)) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION, 1) >= 5:
                width, height = height, width
            return 1 if is_grey(image) else 3, height, width


@contextmanager
def _open(name: str, encoded: Path | io.BytesIO | Image.Image) -> Iterator[Image.Image]:
    """The image, open; what goes wrong while it is read is told by its name."""
    try:
        with encoded if isinstance(encoded, Image.Image) else Image.open(encoded) as image:
            yield image
    except (FileNotFoundError, PermissionError) as error:
        what = "no permission to read it" if isinstance(error, PermissionError) else "no such file"
        raise MissingError(f"{name}: {what}") from error
    except UnidentifiedImageError as error:
        raise ArtifactError(f"{name}: not a readable image; remove or mend it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"{name}: broken image ({error}); remove or mend it") from error


def array_images(
    label: str, images: np.ndarray, *, captions: Sequence[str] | None = None,
    labels: Sequence[int] | None = None, num_classes: int = 0,
) -> Images:  # fmt: skip
    """uint8 images (n, H, W, C) with C = 1 or 3; the fingerprint is of their bytes and shape.

    captions, labels: one per image, where they are known; labels are below `num_classes`.
    """
    images = np.ascontiguousarray(images)
    digest = hashlib.sha256(f"{images.shape}\n".encode())
    digest.update(images.data.cast("B"))

    return _pixel_images(
        label, images.shape, images.__getitem__, digest.hexdigest(),
        lambda wants: captions if wants == "text" else labels, num_classes,
    )  # fmt: skip


def npz_images(source: ImageSource) -> Images:
    """The array `arr_0` of an .npz and the classes `arr_1`; the fingerprint is of the file."""
    path = source.path
    shape, pixels = archives.npz_images(path)
    (digest,) = file_digests(path.parent, [path]).values()
    return _pixel_images(
        source.name, shape, pixels, digest,
        lambda wants: None if wants == "text" else archives.npz_classes(path, shape[0]),
    )  # fmt: skip


def _pixel_images(
    label: str, shape: Sequence[int], pixels: Callable[[int], np.ndarray], fingerprint: str,
    values: Callable[[str], Sequence[Any] | None], num_classes: int = 0,
) -> Images:  # fmt: skip
    """Images from pixels (H, W, C) by number; `values(wants)` are what they show, if known."""
    count, height, width, channels = shape

    def encoded(index: int) -> Image.Image:
        image = pixels(index)
        return Image.fromarray(image[..., 0] if channels == 1 else image)

    def annotate(wants: str, column: str | None) -> RawAnnotations:
        told = values(wants)
        if told is None or len(told) != count or column is not None:
            what = "captions" if wants == "text" else "classes"
            raise _untold(label, column, f"no {what}, one for each image")
        return RawAnnotations(told, label, names=[*map(str, range(num_classes))])

    return Images(
        label, count, fingerprint, lambda index: f"{label}: image {index}", encoded, annotate,
        shape=(channels, height, width),
    )  # fmt: skip


def _untold(label: str, column: str | None, what: str) -> NoAnnotations:
    missing = f"no column {column!r}" if column else what
    return NoAnnotations(
        f"{label}: {missing}; give images with them: a folder with metadata.jsonl, a parquet file "
        f"or webdataset shards"
    )


def lmdb_images(source: ImageSource, files: Sequence[Path]) -> Images:
    """The values of one or more LMDBs, in the order of keys; the fingerprint is of their files."""
    opened = [archives.open_lmdb(file) for file in files]
    keys = [archives.lmdb_keys(file, own) for file, own in zip(files, opened, strict=True)]
    *starts, count = accumulate(map(len, keys), initial=0)

    def find(index: int) -> tuple[int, bytes]:
        place = bisect_right(starts, index) - 1
        return place, keys[place][index - starts[place]]

    def name(index: int) -> str:
        place, key = find(index)
        return f"{files[place].parent}: key {key.decode(errors='backslashreplace')}"

    def encoded(index: int) -> io.BytesIO:
        place, key = find(index)
        return io.BytesIO(archives.lmdb_value(files[place], opened[place], key))

    def annotate(wants: str, column: str | None) -> RawAnnotations:
        what = "captions" if wants == "text" else "classes"
        raise _untold(source.name, column, f"an LMDB holds images alone, no {what}")

    root = source.path if source.path.is_dir() else source.path.parent
    digests = file_digests(root, files)
    return Images(
        source.name, count, _fingerprint(map("\0".join, digests.items())), name, encoded, annotate
    )


def folder_images(source: ImageSource, paths: Sequence[Path]) -> Images:
    """Image files under a folder or in a zip; the fingerprint is of their names and bytes."""

    def encoded(index: int) -> Path | io.BytesIO:
        path = paths[index]
        return path if source.path.is_dir() else io.BytesIO(archives.read_bytes(path))

    digests = file_digests(source.path, paths)
    return Images(
        source.name, len(paths), _fingerprint(map("\0".join, digests.items())),
        name=lambda index: str(paths[index]), encoded=encoded,
        annotate=lambda wants, column: folder_annotations(
            source, paths, wants=wants, column=column
        ),
        file_names=list(digests),
    )  # fmt: skip


def _fingerprint(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))  # of names of files, too
    return digest.hexdigest()


# tables


def table_images(label: str, table: Dataset, splits: Iterable[Dataset] = ()) -> Images:
    """The image column of a table; the fingerprint is of the bytes of its encoded images.

    splits: the tables of all splits, where `table` is of some of them: their classes count, too.
    """
    from datasets import Image as ImageFeature

    features = table.features
    declared = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    usable = declared or [  # which `datasets` can read as images
        name for name, kind in features.items()
        if getattr(kind, "dtype", None) in ("binary", "large_binary")
        or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})
    ]  # fmt: skip
    column = next((name for name in ("image", "img", *usable) if name in usable), None)
    if column is None:
        raise ArtifactError(f"{label}: no column holds images; columns: {', '.join(features)}")
    rows = table.select_columns([column]).cast_column(column, ImageFeature(decode=False))
    files = [Path(file["filename"]) for file in rows.cache_files]

    def made(_: str) -> str:
        return _fingerprint(_digests(label, rows, column))

    if files:  # of all rows, remembered for the files that `datasets` keeps them in
        key = f"{files[0].name} {column} {len(rows)}"
        fingerprint = remembered(files[0].parent, {key: files}, made)[key]
    else:
        fingerprint = made("")

    def encoded(index: int) -> Path | io.BytesIO:
        value = rows[index][column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ArtifactError(f"{label}: row {index} holds no image; leave such rows out")
        return Path(value["path"]) if value["bytes"] is None else io.BytesIO(value["bytes"])

    return Images(
        label, len(rows), fingerprint, lambda index: f"{label}: row {index}", encoded,
        annotate=lambda wants, name: _table_annotations(label, table, splits, wants, name),
    )  # fmt: skip


def _digests(label: str, rows: Dataset, column: str) -> Iterator[str]:
    """SHA-256 of each row's encoded image; none is decoded.

    Raises ArtifactError for a row that names a file which did not come with the table.
    """
    import pyarrow.compute

    index = 0
    for batch in rows.with_format("arrow").iter(batch_size=1_000):
        images = batch.column(column).combine_chunks()
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
                    f"{label}: row {index} names a file, {path.as_py()!r}, instead of holding an "
                    f"image; write the table anew with the images' bytes in it, or give the folder "
                    f"of images"
                )
            index += 1


def _table_annotations(
    label: str, table: Dataset, splits: Iterable[Dataset], wants: str, column: str | None
) -> RawAnnotations:
    """Of a column, or a field of the column `json` that shards have; no other is read."""
    from datasets import Image as ImageFeature

    features, key = table.features, None
    names = [column] if column else [*COLUMNS[wants], *(["txt"] if wants == "text" else [])]
    told = [n for n in names if n in features and not isinstance(features[n], ImageFeature)]
    name = told[0] if told else "json"

    def values(of: Dataset) -> list[Any]:
        return list(of.select_columns([name])[:][name]) if name in of.features else []

    shown = values(table)
    if not told:
        fields = dict.fromkeys(field for one in shown for field in _json_object(one))
        wanted = [column] if column else JSON_FIELDS[wants]
        key = next((field for field in wanted if field in fields), None)
        if key is None:
            within = f"; fields of json: {', '.join(fields)}" if fields else ""
            raise NoAnnotations(
                f"{label}: no column {' or '.join(names)}; columns: {', '.join(features)}{within}"
            )
    where = f"field {key!r} of column {name!r}" if key else f"column {name!r}"
    declared = getattr(features[name], "names", None) or ()  # of a ClassLabel
    others = () if wants == "text" or declared else splits
    classes = [value for table in others for value in values(table)]
    if key:
        shown, classes = ([_json_object(one).get(key) for one in s] for s in (shown, classes))
    return RawAnnotations(shown, where, classes, declared)


def _json_object(value: Any) -> dict[str, Any]:
    """An object of JSON, read or still text; empty where it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            value = None
    return value if isinstance(value, dict) else {}


def _is_fetched(path: str) -> bool:
    """Whether a file lies where `datasets` puts what it fetches: the images of a hub's folder."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    names = ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH")
    caches = [HF_HUB_CACHE, *(getattr(datasets.config, name) for name in names)]
    real = os.path.realpath(path.replace("\0", ""))
    return any(Path(real).is_relative_to(os.path.realpath(cache)) for cache in caches)


def read_tables(source: ImageSource) -> Mapping[str, Dataset]:
    """The tables of a parquet file or shard, a folder of them or of `save_to_disk`, or a hub
    dataset, by split name.

    Files whose name or folder says test or validation are `test`. Raises ArtifactError for files
    that are not what they say, MissingError for what cannot be had.
    """
    if source.kind == "hub" and offline_reason():
        stay_offline()
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if source.kind == "hub":
        try:
            return datasets.load_dataset(source.hub_id)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise MissingError(
                f"{source.name}: {source.hub_id} cannot be had from the hub: {error}; "
                f"give a folder of images or a parquet file instead"
            ) from error
    if source.kind == "disk":
        return _from_disk(source)
    root = source.path if source.path.is_dir() else source.path.parent
    files: dict[str, list[str]] = {"train": [], "test": []}
    for path in source.files:
        held_out = len(source.files) > 1 and is_held_out(path.relative_to(root))
        files["test" if held_out else "train"].append(str(path))
    if not files["train"]:
        files = {"train": files["test"]}
    splits = {split: paths for split, paths in files.items() if paths}
    # `datasets` keeps tables it has read by the times of their files; this name is of their bytes
    digests = "".join(file_digests(root, source.files).values())
    name = hashlib.sha256(digests.encode()).hexdigest()[:16]
    broken = (datasets.exceptions.DatasetGenerationError, tarfile.TarError, ValueError)
    try:
        if source.kind == "webdataset":
            return _read_shards(splits, name)
        tables = datasets.load_dataset(source.kind, name, data_files=splits)
    except broken as error:
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        raise ArtifactError(f"{source.name}: broken or not {source.kind}: {cause}") from error
    except OSError as error:
        raise MissingError(f"{source.name}: cannot be read: {error}") from error
    for split, table in tables.items():  # img2dataset keeps rows that it could not download
        if {"key", "status", "url"} <= set(table.column_names):
            kept = [index for index, status in enumerate(table["status"]) if status == "success"]
            if kept and (failed := len(table) - len(kept)):
                note = f"{source.name}: left out are {failed} images that were not downloaded"
                console.note_once(note)
                tables[split] = table.select(kept)
    return tables


def _from_disk(source: ImageSource) -> Mapping[str, Dataset]:
    """What `save_to_disk` of `datasets` wrote, one table or several splits."""
    import datasets

    try:
        tables = datasets.load_from_disk(source.path)
    except (FileNotFoundError, PermissionError) as error:
        raise MissingError(f"{source.name}: cannot be read: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        cause = (str(error) or type(error).__name__).split("\n")[0]
        raise ArtifactError(f"{source.name}: broken or not of save_to_disk: {cause}") from error
    return tables if isinstance(tables, datasets.DatasetDict) else {"train": tables}


def _read_shards(files: Mapping[str, list[str]], name: str) -> Mapping[str, Dataset]:
    """Shards of webdataset, by split: columns image, and of txt, json and cls what there is.

    `datasets` itself takes the first samples for all: it refuses a field that is null there and
    text later, and shards whose samples lack a field.
    """
    import datasets

    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), **dict.fromkeys(_FIELDS, text)})
    tables = {
        split: datasets.Dataset.from_generator(
            _samples, features, gen_kwargs={"shards": shards, "name": name}
        )
        for split, shards in files.items()
    }
    absent = [
        field for field in _FIELDS
        if all(table.data.column(field).null_count == len(table) for table in tables.values())
    ]  # fmt: skip
    return {split: table.remove_columns(absent) for split, table in tables.items()}


def _samples(shards: Sequence[str], name: str) -> Iterator[dict[str, Any]]:
    """Samples of shards: files that follow each other and agree up to the first dot.

    Of several images of a sample it is the one of fewest dots. name: of the bytes of the shards, by
    which `datasets` tells samples it has kept.
    """
    has_images = False
    for shard in shards:
        with tarfile.open(shard) as archive:
            files = ((PurePosixPath(m.name), m) for m in archive if m.isfile())
            shown = ((path, member) for path, member in files if not path.name.startswith("."))
            for _, members in groupby(shown, lambda f: (f[0].parent, f[0].name.split(".")[0])):
                sample: dict[str, Any] = dict.fromkeys(("image", *_FIELDS))
                fewest = sys.maxsize
                for path, member in members:
                    kind, dots = path.suffix.lower(), member.name.count(".")
                    field = "txt" if kind in (".text", ".caption") else kind[1:]
                    file = archive.extractfile(member)
                    assert file is not None, "a plain file"
                    if kind in image_suffixes() and dots < fewest:
                        fewest = dots
                        sample["image"] = {"bytes": file.read(), "path": None}
                    elif field in _FIELDS and sample[field] is None:
                        sample[field] = file.read().decode("utf-8-sig")
                if any(sample[field] for field in ("image", "txt", "cls")):
                    has_images = True
                    yield sample
    if not has_images:
        raise ValueError("no images")
