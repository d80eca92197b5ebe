"""What an image argument names: found out cheaply, before torch or a decoder is imported.

A command calls `find_place` first, so that a missing folder or dataset is told at once.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from deme_cli.artifacts import read_record
from deme_cli.errors import ConfigError, MissingError
from deme_cli.hub import is_dataset_cached, is_hub_id, offline_reason

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
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
    """A folder of image files, `files` in natural order of their names below it."""

    source: str
    path: Path
    files: tuple[Path, ...]


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


def find_place(source: str) -> Place:
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
        if images := find_files(path, IMAGE_SUFFIXES):
            return ImageFolder(source, path, tuple(images))
        if tables := find_files(path, (".parquet",)):
            return TableFiles(source, path, tuple(tables), "parquet")
        if shards := find_files(path, (".tar",)):
            return TableFiles(source, path, tuple(shards), "webdataset")
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise MissingError(
            f"{source}: the folder holds no images ({kinds}), no parquet files and no shards (tar)"
        )
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


def find_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files under `folder` with these suffixes, in natural order of the names below it; no hidden.

    Links to folders are followed, also out of it, but each real folder is read once: under its own
    name, or that of the first link to it. Raises MissingError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise MissingError(f"{error.filename}: cannot be read: {error.strerror}") from error

    found, seen, starts = [], set(), [folder]
    for start in starts:  # it grows by the links that are met
        for root, folders, files in os.walk(start, onerror=refuse):
            real = os.path.realpath(root)
            known = real in seen
            seen.add(real)
            folders[:] = [] if known else sorted(n for n in folders if not n.startswith("."))
            starts += [path for path in (Path(root, name) for name in folders) if path.is_symlink()]
            found += [
                Path(root, name) for name in files
                if name.lower().endswith(suffixes) and not name.startswith(".") and not known
            ]  # fmt: skip
    return sorted(found, key=lambda path: natural_order(path.relative_to(folder).as_posix()))


def natural_order(name: str) -> tuple[str, str]:
    """A key that sorts 2.png before 10.png: text order, but that a whole number counts as one.

    Names whose numbers are padded with zeros keep their text order.
    """
    numbers = re.sub("0*([0-9]+)", lambda found: f"{len(found[1]):03d}{found[1]}", name)
    return numbers, name
