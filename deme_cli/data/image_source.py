"""What an image argument names: found out cheaply, before torch or a decoder is imported.

A command calls `find_image_source` first, so that a missing folder or dataset is told at once.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deme_cli import console
from deme_cli.artifacts import read_record
from deme_cli.data.splits import find_splits, is_held_out
from deme_cli.errors import ConfigError, MissingError
from deme_cli.fetch import is_dataset_cached, is_hub_id, offline_reason

_NO_PIXELS = ("BUFR", "GRIB", "HDF5", "WMF", "MPEG")  # which Pillow knows by name alone
_TOLD_OF_IMAGES = (
    ".txt", ".caption", ".cls", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".toml",
    ".yaml", ".yml",
)  # fmt: skip
KNOWN_DATASETS = {"cifar10": "uoft-cs/cifar10"}
FOLDERS_ONLY = {
    "lsun-church": "LSUN church_outdoor",
    "lsun-bedroom": "LSUN bedroom",
    "coco": "COCO",
    "imagenet": "ImageNet",
    "parti": "PartiPrompts images",
}


@dataclass(frozen=True)
class Digits:
    """The handwritten digits that come with deme. `source`, of every place, is the argument."""

    source: str


@dataclass(frozen=True)
class ImageFolder:
    """A folder of image files, `files` in natural order of their names below it.

    held_out: those for testing, where folders or names say so; split_folders: the folders that do.
    others: the files that are no images.
    """

    source: str
    path: Path
    files: tuple[Path, ...]
    held_out: frozenset[Path] = frozenset()
    split_folders: frozenset[Path] = frozenset()
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class TableFiles:
    """`files` of tables at or under `path`. kind: `parquet` or `webdataset`."""

    source: str
    path: Path
    files: tuple[Path, ...]
    kind: str


@dataclass(frozen=True)
class SamplesFile:
    """A samples artifact."""

    source: str
    path: Path


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the hub, or in its cache."""

    source: str
    hub_id: str


Place = Digits | ImageFolder | TableFiles | SamplesFile | HubDataset


def find_image_source(source: str) -> Place:
    """The place that an image argument names.

    Raises MissingError where nothing is there, or the hub is out of reach and its cache empty;
    ArtifactError for an artifact of another kind; ConfigError for what no images can be read from.
    """
    if source == "digits":
        return Digits(source)
    path = Path(source).expanduser()
    if source in FOLDERS_ONLY and not path.is_dir():
        raise MissingError(
            f"{source}: deme has no download for {FOLDERS_ONLY[source]}; get the images from their "
            f"publisher, unpack them, and give the folder instead"
        )
    if source not in KNOWN_DATASETS and os.path.lexists(path):
        return _local(source, path)
    hub_id = KNOWN_DATASETS.get(source, source)
    if not is_hub_id(hub_id) or path.suffix in (".safetensors", ".parquet", ".tar"):
        raise MissingError(
            f"{source}: no such file or folder; images are a folder, a parquet file, webdataset "
            f"shards (.tar), a samples artifact, a hub dataset (owner/name), digits or cifar10"
        )
    if not is_dataset_cached(hub_id) and (reason := offline_reason()):
        raise MissingError(
            f"{source}: no such folder, not in the hub's cache as {hub_id}, and {reason}; "
            f"connect to the network, or give a folder of images or a parquet file"
        )
    return HubDataset(source, hub_id)


def _local(source: str, path: Path) -> Place:
    """The place at an existing path."""
    if path.is_dir():
        return _in_folder(source, path)
    if not path.exists():
        raise MissingError(f"{source}: a link to nothing")
    if path.suffix == ".parquet":
        return TableFiles(source, path, (path,), "parquet")
    if path.suffix == ".tar":
        return TableFiles(source, path, (path,), "webdataset")
    if path.suffix == ".safetensors":
        read_record(path, "samples")
        return SamplesFile(source, path)
    raise ConfigError(
        f"{source}: expected a folder of images, a .parquet file, a .tar of webdataset or a "
        f"samples artifact"
    )


def _in_folder(source: str, path: Path) -> Place:
    """The place that a folder's files make: images go before tables, shards before their tables."""
    files = [(file.suffix.lower(), file) for file in find_files(path)]
    images = [file for suffix, file in files if suffix in image_suffixes()]
    tables = [file for suffix, file in files if suffix == ".parquet"]
    shards = [file for suffix, file in files if suffix == ".tar"]
    if images:
        used = {file for file in tables if file.name == "metadata.parquet" or _is_index(file)}
        others = [file for suffix, file in files if suffix not in image_suffixes()]
        _tell_left_out(source, (file for file in others if file not in used))
        return _image_folder(source, path, images, others)
    beside = {file.with_suffix("") for file in shards}
    if shards and all(file.with_suffix("") in beside for file in tables):  # as img2dataset writes
        _tell_left_out(
            source, (file for suffix, file in files if suffix not in (".tar", ".parquet"))
        )
        return TableFiles(source, path, tuple(shards), "webdataset")
    if tables:
        _tell_left_out(source, (file for suffix, file in files if suffix != ".parquet"))
        return TableFiles(source, path, tuple(tables), "parquet")
    found = f"; its files: {_count_suffixes(file for _, file in files)}" if files else ""
    raise MissingError(
        f"{source}: the folder holds no images that Pillow can open, no parquet files and no "
        f"shards (tar){found}"
    )


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that Pillow reads images from."""
    from PIL import Image

    known = Image.registered_extensions()
    readable = {*Image.OPEN, "MPO"} - set(_NO_PIXELS)  # MPO: JPEG's reader takes it
    return frozenset(suffix for suffix, kind in known.items() if kind in readable)


def _is_index(table: Path) -> bool:
    """Whether a table lists the images of the folder of its name, as img2dataset writes it."""
    return table.with_suffix("").is_dir()


def _tell_left_out(source: str, files: Iterable[Path]) -> None:
    """Say which files are read neither as images nor as what is told of them."""
    left_out = [file for file in files if file.suffix.lower() not in _TOLD_OF_IMAGES]
    if left_out:
        console.note_once(
            f"{source}: left out are files of other kinds: {_count_suffixes(left_out)}"
        )


def _count_suffixes(files: Iterable[Path]) -> str:
    counts = Counter(file.suffix.lower() or "without a suffix" for file in files).most_common()
    more = f" and {len(counts) - 8} other kinds" if len(counts) > 8 else ""
    return ", ".join(f"{count} {suffix}" for suffix, count in counts[:8]) + more


def _image_folder(
    source: str, path: Path, images: Sequence[Path], others: Sequence[Path]
) -> ImageFolder:
    """The place of images; says which are held out, and which are in no split."""
    splits = find_splits(path, images)
    if num := len(splits.held_out):
        held = {folder for folder in splits.folders if is_held_out(folder.relative_to(path))}
        where = ", ".join(sorted(f"{folder.relative_to(path)}/" for folder in held)[:4])
        rest = len(images) - len(splits.images)
        console.note_once(
            f"{source}: held out are {num} images{f' in {where}' if held else ', by their names'}; "
            f"{len(splits.images) - num} to train on"
            + f"; {rest} in neither are left out"
            * bool(rest)
        )
    return ImageFolder(source, path, splits.images, splits.held_out, splits.folders, tuple(others))


def find_files(folder: Path) -> list[Path]:
    """Files under `folder` that are not hidden, in natural order of the names below it.

    Links to folders are followed, also out of it, but each real folder is read once: under its own
    name, or that of the first link to it. Raises MissingError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise MissingError(f"{error.filename}: cannot be read: {error.strerror}") from error

    found: list[str] = []
    seen, starts = set(), [str(folder)]
    for start in starts:  # it grows by the links that are met
        for root, folders, files in os.walk(start, onerror=refuse):
            real = os.path.realpath(root)
            known = real in seen
            seen.add(real)
            folders[:] = (
                [] if known else sorted(n for n in folders if not n.startswith((".", "__")))
            )
            starts += filter(os.path.islink, (os.path.join(root, name) for name in folders))
            found += [os.path.join(root, n) for n in files if not n.startswith(".") and not known]
    return [Path(name) for name in sorted(found, key=natural_order)]


def natural_order(name: str) -> tuple[str, str]:
    """A key that sorts 2.png before 10.png: text order, but that a whole number counts as one.

    Names whose numbers are padded with zeros keep their text order.
    """
    numbers = re.sub("0*([0-9]+)", lambda found: f"{len(found[1]):03d}{found[1]}", name)
    return numbers, name
