"""What an image argument names, found cheaply, and which of its images are held out.

A command calls `find_image_source` first, so that a missing folder or dataset is told at once:
nothing here imports torch, or looks into an image. Held out are images as names of folders and
files say, in the words that `datasets` knows splits by.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deme_cli import console
from deme_cli.artifacts import read_record
from deme_cli.errors import ConfigError, MissingError
from deme_cli.fetch import is_dataset_cached, is_hub_id, offline_reason

KNOWN_DATASETS = {"cifar10": "uoft-cs/cifar10"}
FOLDERS_ONLY = {
    "lsun-church": "LSUN church_outdoor", "lsun-bedroom": "LSUN bedroom", "coco": "COCO",
    "imagenet": "ImageNet", "parti": "PartiPrompts images",
}  # fmt: skip
HELD_OUT_WORDS = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")
_TRAIN_WORDS = ("train", "training")
_BETWEEN = "[-._ 0-9]"
_NO_PIXELS = {"BUFR", "GRIB", "HDF5", "WMF", "MPEG"}  # which Pillow knows by name alone
_BESIDE_IMAGES = (
    ".txt", ".caption", ".cls", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".toml",
    ".yaml", ".yml",
)  # fmt: skip


@dataclass(frozen=True)
class ImageSource:
    """What an argument names. kind: digits, folder, parquet, webdataset, samples or hub.

    name: the argument, for messages.   files: the images or tables at or under `path`, in natural
    order.   others: files of a folder that are no images.   held_out: images for testing, where
    folders or names say so; split_folders: the folders that do.
    """

    name: str
    kind: str
    path: Path = Path()
    files: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    held_out: frozenset[Path] = frozenset()
    split_folders: frozenset[Path] = frozenset()
    hub_id: str = ""


def find_image_source(name: str) -> ImageSource:
    """The source that an image argument names.

    Raises MissingError where nothing is there, or the hub is out of reach and its cache empty;
    ArtifactError for an artifact of another kind; ConfigError for what no images can be read from.
    """
    if name == "digits":
        return ImageSource(name, "digits")
    path = Path(name).expanduser()
    if name in FOLDERS_ONLY and not path.is_dir():
        raise MissingError(
            f"{name}: deme has no download for {FOLDERS_ONLY[name]}; get the images from their "
            f"publisher, unpack them, and give the folder instead"
        )
    if name not in KNOWN_DATASETS and os.path.lexists(path):
        return _in_folder(name, path) if path.is_dir() else _of_file(name, path)
    hub_id = KNOWN_DATASETS.get(name, name)
    if not is_hub_id(hub_id) or path.suffix in (".safetensors", ".parquet", ".tar"):
        raise MissingError(
            f"{name}: no such file or folder; images are a folder, a parquet file, webdataset "
            f"shards (.tar), a samples artifact, a hub dataset (owner/name), digits or cifar10"
        )
    if not is_dataset_cached(hub_id) and (reason := offline_reason()):
        raise MissingError(
            f"{name}: no such folder, not in the hub's cache as {hub_id}, and {reason}; "
            f"connect to the network, or give a folder of images or a parquet file"
        )
    return ImageSource(name, "hub", hub_id=hub_id)


def _of_file(name: str, path: Path) -> ImageSource:
    if not path.exists():
        raise MissingError(f"{name}: a link to nothing")
    if path.suffix == ".safetensors":
        read_record(path, "samples")
    kinds = {".parquet": "parquet", ".tar": "webdataset", ".safetensors": "samples"}
    if path.suffix not in kinds:
        raise ConfigError(
            f"{name}: expected a folder of images, a .parquet file, a .tar of webdataset or a "
            f"samples artifact"
        )
    return ImageSource(name, kinds[path.suffix], path, (path,))


def _in_folder(name: str, path: Path) -> ImageSource:
    """A folder's images go before its tables, shards before tables of their names."""
    files = find_files(path)
    images, tables, shards = (
        tuple(file for file in files if file.suffix.lower() in suffixes)
        for suffixes in (image_suffixes(), (".parquet",), (".tar",))
    )
    beside = {file.with_suffix("") for file in shards}
    if images:  # img2dataset writes tables of the names of its folders
        used = {t for t in tables if t.name == "metadata.parquet" or t.with_suffix("").is_dir()}
    elif shards and all(file.with_suffix("") in beside for file in tables):
        kind, used, tables = "webdataset", {*shards, *tables}, shards
    elif tables:
        kind, used = "parquet", set(tables)
    else:
        told = f"; its files: {_count_suffixes(files)}" if files else ""
        raise MissingError(
            f"{name}: the folder holds no images that Pillow can open, no parquet files and no "
            f"shards (tar){told}"
        )
    left_out = [
        file for file in files
        if file not in used and file.suffix.lower() not in (*_BESIDE_IMAGES, *image_suffixes())
    ]  # fmt: skip
    if left_out:
        console.note_once(f"{name}: left out are files of other kinds: {_count_suffixes(left_out)}")
    if not images:
        return ImageSource(name, kind, path, tables)
    chosen, held_out, folders = find_splits(path, images)
    if held_out:
        _describe_splits(name, path, len(images), chosen, held_out, folders)
    others = tuple(file for file in files if file.suffix.lower() not in image_suffixes())
    return ImageSource(name, "folder", path, chosen, others, held_out, folders)


def _describe_splits(
    name: str, path: Path, num: int, chosen: Sequence[Path], held_out: Collection[Path],
    folders: Collection[Path],
) -> None:  # fmt: skip
    test = [folder.relative_to(path) for folder in folders]
    listed = ", ".join(sorted(f"{folder}/" for folder in test if is_held_out(folder))[:4])
    rest = num - len(chosen)
    console.note_once(
        f"{name}: held out are {len(held_out)} images"
        f"{f' in {listed}' if listed else ', by their names'}; {len(chosen) - len(held_out)} to "
        f"train on{f'; {rest} in neither are left out' if rest else ''}"
    )


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that Pillow reads images from."""
    from PIL import Image

    known = Image.registered_extensions()
    readable = {*Image.OPEN, "MPO"} - _NO_PIXELS  # MPO: JPEG's reader takes it
    return frozenset(suffix for suffix, kind in known.items() if kind in readable)


def _count_suffixes(files: Iterable[Path]) -> str:
    counts = Counter(file.suffix.lower() or "without a suffix" for file in files).most_common()
    more = f" and {len(counts) - 8} other kinds" if len(counts) > 8 else ""
    return ", ".join(f"{count} {suffix}" for suffix, count in counts[:8]) + more


def find_files(folder: Path) -> list[Path]:
    """Files under `folder` that are not hidden, in natural order of the names below it.

    Links to folders are followed, also out of it, but each real folder is read once: under its own
    name, or that of the first link to it. Raises MissingError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise MissingError(f"{error.filename}: cannot be read: {error.strerror}") from error

    names: list[str] = []
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
            names += [os.path.join(root, n) for n in files if not n.startswith(".") and not known]
    return [Path(name) for name in sorted(names, key=natural_order)]


def natural_order(name: str) -> tuple[str, str]:
    """A key that sorts 2.png before 10.png: text order, but that a whole number counts as one.

    Names whose numbers are padded with zeros keep their text order.
    """
    numbers = re.sub("0*([0-9]+)", lambda found: f"{len(found[1]):03d}{found[1]}", name)
    return numbers, name


# splits


def find_splits(
    root: Path, images: Sequence[Path]
) -> tuple[tuple[Path, ...], frozenset[Path], frozenset[Path]]:
    """The images in a split, those of them held out, and the folders below `root` that say so.

    Where no folder does, names may, if all say one. Where folders to train on lie beside those
    held out, images in neither are in no split. Without any split the last two are empty.
    """
    parents = {image.parent for image in images}
    held, train = _split_folders(root, parents)
    inside = {
        parent: [folders for folders in (held, train) if not folders.isdisjoint(_up(parent))]
        for parent in parents
    }
    held_out = {image for image in images if held and held in inside[image.parent]}
    kept = [image for image in images if inside[image.parent]] if train else images
    if not held and all(_speaks_of(image.name, HELD_OUT_WORDS + _TRAIN_WORDS) for image in images):
        held_out = {image for image in images if not _speaks_of(image.name, _TRAIN_WORDS)}
    if not held_out or len(held_out) == len(kept):
        return tuple(images), frozenset(), frozenset()
    return tuple(kept), frozenset(held_out), frozenset(held | train)


def _split_folders(root: Path, parents: Collection[Path]) -> tuple[set[Path], set[Path]]:
    """Of the folders that hold images: those held out, and those to train on beside them.

    One named `test2017` is held out. One named `test_set` is where `training_set` lies beside it,
    or no folder that says neither; else it may be a class, as `test tube` is.
    """
    siblings: dict[Path, set[Path]] = {}
    for folder in {folder for parent in parents for folder in _up(parent)}:
        if root in folder.parents:
            siblings.setdefault(folder.parent, set()).add(folder)
    held_out, to_train = set(), set()
    for folders in siblings.values():
        train = {folder for folder in folders if _speaks_of(folder.name, _TRAIN_WORDS)}
        test = {f for f in folders - train if _speaks_of(f.name, HELD_OUT_WORDS)}
        if not train or folders - train - test:
            rests = {"", *(_rest(folder.name, _TRAIN_WORDS) for folder in train)}
            test = {folder for folder in test if _rest(folder.name, HELD_OUT_WORDS) in rests}
        if test:
            held_out |= test
            to_train |= train
    return held_out, to_train


def _up(folder: Path) -> tuple[Path, ...]:
    return (folder, *folder.parents)


def _speaks_of(name: str, words: Sequence[str]) -> bool:
    """Whether one of `words` stands in a name by itself, between anything but letters."""
    return not set(words).isdisjoint(re.split(_BETWEEN, name.lower()))


def _rest(name: str, words: Sequence[str]) -> str:
    """A name without `words` and all that is not a letter."""
    return "".join(part for part in re.split(_BETWEEN, name.lower()) if part not in words)


def is_held_out(path: Path) -> bool:
    """Whether a folder or the file in a relative path says test or validation."""
    return any(_speaks_of(part, HELD_OUT_WORDS) for part in path.with_suffix("").parts)
