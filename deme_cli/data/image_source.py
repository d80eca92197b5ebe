"""What an image argument names, found cheaply: its files, their digests, and which are held out.

A command calls `find_image_source` first, so that a missing folder or dataset is told at once:
nothing here imports torch, or looks into an image. Held out are images as names of folders and
files say, in the words that `datasets` knows splits by.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

from deme_cli import console
from deme_cli.artifacts import read_record
from deme_cli.data.archives import PIXELS, files_in_zip, npz_names, pickled_cifar, read_bytes
from deme_cli.errors import ArtifactError, ConfigError, MissingError, reading
from deme_cli.fetch import cache_folder, is_dataset_cached, is_hub_id, offline_reason, sha256_of
from deme_cli.files import write_whole

KNOWN_DATASETS = {"cifar10": "uoft-cs/cifar10"}
FOLDERS_ONLY = {
    "lsun-church": "LSUN church_outdoor", "lsun-bedroom": "LSUN bedroom", "coco": "COCO",
    "imagenet": "ImageNet", "parti": "PartiPrompts images",
}  # fmt: skip
HELD_OUT_WORDS = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")
_TRAIN_WORDS = ("train", "training")
_KINDS = {
    ".parquet": "parquet", ".tar": "webdataset", ".safetensors": "samples", ".zip": "folder",
    ".npz": "npz", ".mdb": "lmdb",
}  # fmt: skip
_NO_PIXELS = {"BUFR", "GRIB", "HDF5", "WMF", "MPEG"}  # which Pillow knows by name alone
_BESIDE_IMAGES = (
    ".txt", ".caption", ".cls", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".toml",
    ".yaml", ".yml",
)  # fmt: skip
_SETTLED_NS = 2 * 10**9  # of younger files a second change could bear the very times of the first


@dataclass(frozen=True)
class ImageSource:
    """What an argument names. kind: digits, folder (or a zip), lmdb, npz, parquet, webdataset, disk
    (of `save_to_disk`), samples or hub.

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
    path, hub_id = Path(name).expanduser(), KNOWN_DATASETS.get(name, name)
    if name == "digits":
        return ImageSource(name, "digits")
    if name not in KNOWN_DATASETS and path.is_dir():
        return _in_folder(name, path)
    if name in FOLDERS_ONLY:
        raise MissingError(
            f"{name}: deme has no download for {FOLDERS_ONLY[name]}; get the images from their "
            f"publisher, unpack them, and give the folder instead"
        )
    if name not in KNOWN_DATASETS and path.exists():
        if path.suffix == ".zip":
            return _in_folder(name, path)
        if path.name.startswith("cifar-10-python"):
            raise ConfigError(pickled_cifar(name, path.parent))
        if path.suffix not in _KINDS:
            raise ConfigError(
                f"{name}: expected a folder or .zip of images, an LMDB, a .parquet file, a .tar of "
                f"webdataset, an .npz with {PIXELS} or a samples artifact"
            )
        if path.suffix == ".safetensors":
            read_record(path, "samples")
        if path.suffix == ".npz" and PIXELS not in (found := npz_names(path)):
            listed = ", ".join(sorted(found)) or "nothing"
            raise ArtifactError(f"{name}: expected images, {PIXELS}, found {listed}")
        return ImageSource(name, _KINDS[path.suffix], path, (path,))
    if not is_hub_id(hub_id) or path.suffix in _KINDS:
        raise MissingError(
            f"{name}: no such file or folder; images are a folder or zip, an LMDB, a parquet file, "
            f"webdataset shards (.tar), an .npz with {PIXELS}, a samples artifact, a hub dataset "
            f"(owner/name), digits or cifar10"
        )
    if not is_dataset_cached(hub_id) and (reason := offline_reason()):
        raise MissingError(
            f"{name}: no such folder, not in the hub's cache as {hub_id}, and {reason}; "
            f"connect to the network, or give a folder of images or a parquet file"
        )
    return ImageSource(name, "hub", hub_id=hub_id)


def _in_folder(name: str, path: Path) -> ImageSource:
    """A folder's images go before its tables, shards before tables of their names; so in a zip."""
    if any((path / made).is_file() for made in ("dataset_dict.json", "state.json")):
        return ImageSource(name, "disk", path)
    files = find_files(path) if path.is_dir() else _natural(map(str, files_in_zip(path)))
    images = [file for file in files if file.suffix.lower() in image_suffixes()]
    others = [file for file in files if file.suffix.lower() not in image_suffixes()]
    tables, shards = (
        [f for f in others if f.suffix.lower() == kind] for kind in (".parquet", ".tar")
    )
    if images:  # img2dataset writes tables of the names of its folders
        kind = "folder"
        used = {t for t in tables if t.name == "metadata.parquet" or t.with_suffix("").is_dir()}
    elif shards and {t.with_suffix("") for t in tables} <= {s.with_suffix("") for s in shards}:
        kind, used, tables = "webdataset", {*shards, *tables}, shards
    elif databases := [f for f in others if f.suffix == ".mdb" and f.name != "lock.mdb"]:
        kind, used, tables = "lmdb", {f for f in others if f.suffix == ".mdb"}, databases
    else:
        kind, used = "parquet", set(tables)
    left_out = [f for f in others if f not in used and f.suffix.lower() not in _BESIDE_IMAGES]
    counts = Counter(file.suffix.lower() or "without a suffix" for file in left_out or others)
    listed = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(8))
    if pickled := next((f for f in others if f.name == "data_batch_1" and not tables), None):
        raise ConfigError(pickled_cifar(name, pickled.absolute().parent.parent))
    if not images and (path.is_file() or not tables):
        wanted = "unpack it first" if path.is_file() else "no parquet files, shards (tar) or LMDB"
        raise MissingError(
            f"{name}: holds no images that Pillow can open; {wanted}"
            f"{f'; its files: {listed}' if others else ''}"
        )
    if left_out:
        console.note_once(f"{name}: left out are files of other kinds: {listed}")
    if not images:
        held = {f for f in tables if kind == "lmdb" and is_held_out(f.relative_to(path))}
        held_out = frozenset(held if len(held) < len(tables) else ())
        return ImageSource(name, kind, path, tuple(tables), held_out=held_out)
    chosen, held_out, folders = find_splits(path, images)
    if held_out:
        rest, test = len(images) - len(chosen), [folder.relative_to(path) for folder in folders]
        listed = ", ".join(sorted(f"{folder}/" for folder in test if is_held_out(folder))[:4])
        console.note_once(
            f"{name}: held out are {len(held_out)} images "
            f"{f'in {listed}' if listed else 'by their names'}; {len(chosen) - len(held_out)} to "
            f"train on{f'; {rest} in neither are left out' if rest else ''}"
        )
    return ImageSource(name, kind, path, tuple(chosen), tuple(others), held_out, folders)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that Pillow reads images from."""
    from PIL import Image

    known = Image.registered_extensions()
    readable = {*Image.OPEN, "MPO"} - _NO_PIXELS  # MPO: JPEG's reader takes it
    return frozenset(suffix for suffix, kind in known.items() if kind in readable)


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
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
            starts += filter(os.path.islink, (os.path.join(root, name) for name in folders))
            names += [os.path.join(root, name) for name in files if not name.startswith(".")]
    return _natural(names)


def _natural(names: Iterable[str]) -> list[Path]:
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
) -> tuple[Sequence[Path], frozenset[Path], frozenset[Path]]:
    """The images in a split, those of them held out, and the folders below `root` that say so.

    A folder named `test2017` is held out. One named `test_set` is where `training_set` lies beside
    it, or `train` and no folder that says neither; else it may be a class, as `test tube` is. Where
    folders to train on lie beside those held out, images in neither are in no split. Where no
    folder says so, names may, if all say one. Without any split the last two are empty.
    """
    siblings: dict[Path, set[Path]] = defaultdict(set)
    for parent in {image.parent for image in images}:
        for folder in (parent, *parent.parents):
            if root in folder.parents:
                siblings[folder.parent].add(folder)
    held: set[Path] = set()
    train: set[Path] = set()
    for folders in siblings.values():
        to_train = {
            f: rest for f in folders if (rest := _without(f.name, _TRAIN_WORDS)) is not None
        }
        test = {f: _without(f.name, HELD_OUT_WORDS) for f in folders - to_train.keys()}
        rests, is_class = {"", *to_train.values()}, not to_train or None in test.values()
        chosen = {f for f, rest in test.items() if rest in rests or (rest and not is_class)}
        if chosen:
            held |= chosen
            train |= to_train.keys()
    above = {parent: {parent, *parent.parents} for parent in {image.parent for image in images}}
    held_out = {image for image in images if above[image.parent] & held}
    kept = [i for i in images if not train or above[i.parent] & (held | train)]
    if not held:
        training = {i for i in images if _without(i.name, _TRAIN_WORDS) is not None}
        if all(image in training or is_held_out(Path(image.name)) for image in images):
            held_out = {*images} - training
    if not held_out or len(held_out) == len(kept):
        return images, frozenset(), frozenset()
    return kept, frozenset(held_out), frozenset(held | train)


def _without(name: str, words: Sequence[str]) -> str | None:
    """The letters of a name but `words`; None where none of these stands in it by itself."""
    parts = re.split("[-._ 0-9]", name.lower())
    left = [part for part in parts if part not in words]
    return "".join(left) if len(left) < len(parts) else None


def is_held_out(path: Path) -> bool:
    """Whether a folder or the file in a relative path says test or validation."""
    names = path.with_suffix("").parts
    return any(_without(name, HELD_OUT_WORDS) is not None for name in names)


# digests


def file_digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by their name below `folder`, or a zip, whose files have those of a folder.

    Raises MissingError for one that is not read.

    On two cores 1.4 GB/s the first time; later 0.1 s for 10,000 files.
    """
    is_zip = folder.is_file()
    files = {p.relative_to(folder).as_posix(): [folder if is_zip else p] for p in paths}

    def digest(name: str) -> str:
        path = folder / name
        return hashlib.sha256(read_bytes(path)).hexdigest() if is_zip else sha256_of(path)

    return remembered(folder, files, digest)


def remembered(
    folder: Path, files: Mapping[str, Sequence[Path]], make: Callable[[str], str]
) -> dict[str, str]:
    """make(name) for each name, or what it gave before where its files have not changed since.

    That they have not is seen by inode, size and both times. What was made is kept in the cache
    folder, in a JSON file per folder; losing it costs time alone, so one that cannot be read or
    written is passed over. make: called in threads.
    """
    keys, young = {}, set()
    for name, paths in files.items():
        keys[name] = name
        for path in paths:
            with reading(path):
                stat = os.stat(path)
            keys[name] += f"\0{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
            if max(stat.st_mtime_ns, stat.st_ctime_ns) > time.time_ns() - _SETTLED_NS:
                young.add(name)
    place = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    memory, known = None, {}
    try:
        memory = cache_folder() / "digests" / f"{place}.json"
        known = {k: v for k, v in json.loads(memory.read_bytes()).items() if isinstance(v, str)}
    except (OSError, ValueError, AttributeError, RuntimeError):  # also: no home folder is known
        pass
    values = {name: known[key] for name, key in keys.items() if key in known}
    absent = [name for name in keys if name not in values]
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        made = dict(zip(absent, pool.map(make, absent, chunksize=64), strict=True))
    learned = {keys[name]: value for name, value in made.items() if name not in young}
    if memory and learned:
        kept = {key: value for key, value in known.items() if key.split("\0")[0] not in keys}
        kept |= {keys[name]: value for name, value in values.items()} | learned
        with contextlib.suppress(OSError, MissingError):  # where no file goes, all is made anew
            write_whole(memory, [json.dumps(kept).encode()])
    return {name: (values | made)[name] for name in keys}
