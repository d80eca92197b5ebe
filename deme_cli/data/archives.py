"""Images in archives, as benchmarks publish them: zip, LMDB, `.npz`. Nothing is unpacked to disk.

A zip (StyleGAN, EDM) is a folder whose paths go on behind its name: `set.zip/00000/img.png`. An
LMDB (LSUN) has encoded images by key. The array `arr_0` of an `.npz` (ADM) holds pixels: it is
mapped where it is stored as it is, else inflated in order. Nothing here unpickles.
n images, H height, W width, C channels.
"""

from __future__ import annotations

import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import IO, TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from deme_cli import console
from deme_cli.errors import ArtifactError, MissingError, reading

if TYPE_CHECKING:
    import numpy as np
    from lmdb import Environment

STATISTICS_PICKLES = (".pkl", ".pt", ".pth")
PIXELS, CLASSES = "arr_0", "arr_1"  # as np.savez names what it is given, and ADM leaves it
_BLOCK_BYTES = 8 << 20
_LARGE_BYTES = 2 << 30  # decoded images of more are not kept in memory
_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, ValueError)


# zip


def files_in_zip(path: Path) -> list[Path]:
    """The files in a zip, as paths below it, without hidden ones. Raises ArtifactError if none."""
    shown = []
    for file in _open_zip(path, _identity(path))[1]:
        *folders, name = file.relative_to(path).parts
        if not name.startswith(".") and not any(f.startswith((".", "__")) for f in folders):
            shown.append(file)
    return shown


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, or of one in a zip. Raises MissingError, ArtifactError naming it."""
    if (archive := _zip_of(path)) is None:
        with reading(path):
            return path.read_bytes()
    opened, members = _open_zip(archive, _identity(archive))
    if path not in members:
        raise MissingError(f"{path}: no such file in the zip")
    with _reading_archive(path):
        return opened.read(members[path])


def exists(path: Path) -> bool:
    """Whether a file is there, or in a zip."""
    archive = _zip_of(path)
    return path in _open_zip(archive, _identity(archive))[1] if archive else path.exists()


def _zip_of(path: Path) -> Path | None:
    return next((p for p in path.parents if p.suffix == ".zip" and p.is_file()), None)


@lru_cache(maxsize=4)
def _open_zip(
    path: Path, _: tuple[int, ...]
) -> tuple[zipfile.ZipFile, dict[Path, zipfile.ZipInfo]]:
    """A zip, whose readers may be several threads, and its members by path."""
    try:
        with reading(path):
            opened = zipfile.ZipFile(path)
    except _BROKEN as error:
        what = f"not a whole {path.suffix} file; fetch or make it again"
        raise ArtifactError(f"{path}: {what}") from error
    members = (info for info in opened.infolist() if not info.is_dir())
    return opened, {path / str(PurePosixPath(i.filename)).lstrip("/"): i for i in members}


def _identity(path: Path) -> tuple[int, ...]:
    """What changes where a file is replaced."""
    with reading(path):
        stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@contextmanager
def _reading_archive(path: Path, where: str = "") -> Iterator[None]:
    """Translate what libraries say of an archive that is damaged while `path` is read."""
    try:
        with reading(path):
            yield
    except _BROKEN as error:
        what = str(error) or type(error).__name__
        raise ArtifactError(f"{path}{where}: broken ({what}); fetch or make it again") from error


# LMDB

_environments: WeakValueDictionary[tuple[Any, ...], Environment] = WeakValueDictionary()
_opening = Lock()


def open_lmdb(path: Path) -> Environment:
    """The LMDB in a `data.mdb`, for reading by any number of threads and processes.

    Nothing is locked or written, so the folder may be read-only. A process opens a file once.
    Raises MissingError without the package, ArtifactError for a file that is not a whole LMDB.
    """
    if find_spec("lmdb") is None:
        raise MissingError(f"{path}: reading an LMDB needs lmdb: pip install 'deme[lsun]'")
    import lmdb

    key = (os.getpid(), os.path.realpath(path), *_identity(path))
    with _opening:
        if (opened := _environments.get(key)) is None:
            with reading(path), path.open("rb"):
                pass  # what lmdb says of a file without permission names no cause
            try:
                opened = lmdb.open(
                    str(path), subdir=False, readonly=True, lock=False, readahead=False
                )
            except lmdb.Error as error:
                what = f"not a whole LMDB ({error}); fetch or make it again"
                raise ArtifactError(f"{path}: {what}") from error
            expected = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
            if (size := path.stat().st_size) < expected:  # what lies behind would end the process
                opened.close()
                raise ArtifactError(
                    f"{path}: cut off: expected {expected} bytes, found {size}; fetch it again"
                )
            _environments[key] = opened
    return opened


def lmdb_keys(path: Path, opened: Environment) -> Sequence[bytes]:
    """All keys, in order. Raises ArtifactError for none."""
    with _reading_lmdb(path), opened.begin() as transaction:
        keys = list(transaction.cursor().iternext(keys=True, values=False))
    if not keys:
        raise ArtifactError(f"{path}: the LMDB is empty")
    return keys


def lmdb_value(path: Path, opened: Environment, key: bytes) -> bytes:
    with _reading_lmdb(path), opened.begin() as transaction:
        value = transaction.get(key)
    assert value is not None, "one of the keys that were read"
    return value


@contextmanager
def _reading_lmdb(path: Path) -> Iterator[None]:
    import lmdb

    try:
        yield
    except lmdb.Error as error:
        raise ArtifactError(f"{path}: broken ({error}); fetch or make it again") from error


# npz


def npz_names(path: Path) -> set[str]:
    """The arrays in an .npz, from its table of contents. Raises MissingError, ArtifactError."""
    members = _open_zip(path, _identity(path))[1]
    return {file.name.removesuffix(".npy") for file in members}


def npz_images(path: Path) -> tuple[tuple[int, ...], Callable[[int], np.ndarray]]:
    """The shape (n, H, W, C) of `arr_0`, and its image (H, W, C) by number.

    Raises ArtifactError where it is no array of images, or the file is cut off.
    """
    import numpy as np

    archive = _open_zip(path, _identity(path))[0]
    with _reading_archive(path, f": {PIXELS}"):
        info = archive.getinfo(f"{PIXELS}.npy")
        with archive.open(info) as file:
            is_first, npy = np.lib.format.read_magic(file) == (1, 0), np.lib.format
            read = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
            shape, is_fortran, dtype = read(file)
            skip = file.tell()
        with path.open("rb") as plain:  # the names before the array have their lengths in front
            plain.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", plain.read(4))) + skip
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or is_fortran or not shape[0]:
        raise ArtifactError(
            f"{path}: expected {PIXELS} to be uint8 (n, H, W, 3 or 1), one image after the other, "
            f"found {dtype} {shape}{' in the order of Fortran' * is_fortran}"
        )
    num_bytes = math.prod(shape)
    if info.file_size != skip + num_bytes:
        raise ArtifactError(
            f"{path}: {PIXELS} has {info.file_size - skip} bytes, its shape {shape} {num_bytes}"
        )
    if info.compress_type == zipfile.ZIP_STORED:
        with _reading_archive(path):
            return shape, np.memmap(path, np.uint8, "r", start, shape).__getitem__
    if num_bytes > _LARGE_BYTES:
        console.note_once(
            f"{path}: {PIXELS} is compressed and read in order; another order, as training has it, "
            f"takes long: write it anew with np.savez"
        )
    return shape, _inflated(path, skip, shape)


def _inflated(path: Path, skip: int, shape: tuple[int, ...]) -> Callable[[int], np.ndarray]:
    """An image of a compressed array by number; of going back it begins anew.

    Two blocks are kept, as threads ask for images that lie close together.
    """
    import numpy as np

    per_block = max(64, _BLOCK_BYTES // math.prod(shape[1:]))
    lock, following = Lock(), 0
    file: IO[bytes] | None = None
    kept: dict[int, np.ndarray] = {}

    def image(index: int) -> np.ndarray:
        nonlocal file, following
        wanted, place = divmod(index, per_block)
        with lock, _reading_archive(path, f": {PIXELS}, image {index}"):
            if file is None or (wanted < following and wanted not in kept):
                kept.clear()
                file, following = _open_zip(path, _identity(path))[0].open(f"{PIXELS}.npy"), 0
                file.read(skip)
            while wanted >= following:
                own = (min(per_block, shape[0] - following * per_block), *shape[1:])
                kept[following] = np.frombuffer(file.read(math.prod(own)), np.uint8).reshape(own)
                kept.pop(following - 2, None)
                following += 1
            return kept[wanted][place]

    return image


def npz_classes(path: Path, count: int) -> list[int] | None:
    """The classes `arr_1` beside the images, None without; raises ArtifactError for other ones."""
    import numpy as np

    if CLASSES not in npz_names(path):
        return None
    with _reading_archive(path), np.load(path, allow_pickle=False) as arrays:
        classes = arrays[CLASSES]
    if classes.shape != (count,) or classes.dtype.kind not in "iu":
        raise ArtifactError(
            f"{path}: expected {CLASSES} to hold a whole number for each of {count} images, found "
            f"{classes.dtype} {classes.shape}"
        )
    return classes.tolist()


# pickles, which are refused


def pickled_cifar(name: str, root: Path) -> str:
    """What to do with CIFAR-10 as its publisher has it; torchvision compares checksums first."""
    return (
        f"{name}: CIFAR-10's files are pickles, of which deme reads none; make parquet files of "
        f'them: python -c "from datasets import Dataset; from torchvision.datasets import CIFAR10; '
        f"root = {str(root)!r}; [Dataset.from_list([{{'image': image, 'label': label}} for image, "
        f"label in CIFAR10(root, split == 'train', download=True)])"
        f".to_parquet(f'{{root}}/cifar10-{{split}}.parquet') for split in ('train', 'test')]\"; "
        f"then give {root}"
    )


def pickled_statistics(path: Path, features: str) -> str:
    """How statistics of EDM2 (.pkl) and torch-fidelity (.pt) become an .npz."""
    made = str(path.with_suffix(".npz"))
    if path.suffix == ".pkl":
        key = "fd_dinov2" if features == "dinov2" else "fid"
        load = f"import pickle; s = pickle.load(open({str(path)!r}, 'rb'))[{key!r}]"
    else:
        load = f"import torch; s = torch.load({str(path)!r}, weights_only=False)"
    return (
        f"{path}: a pickle, which could run anything and is not read; if you trust it: python -c "
        f"\"import numpy; {load}; numpy.savez({made!r}, mu=s['mu'], sigma=s['sigma'])\"; then give "
        f"{made}"
    )
