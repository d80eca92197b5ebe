"""SHA-256 of files, remembered: their bytes decide, and are read again only where a file changed.

What was computed is kept under `digests` in the cache folder, one JSON file per folder of data, by
name, inode, size and both times of each file. Losing that file costs time alone: it is replaced as
a whole, by whoever comes last, and one that cannot be read or written is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deme_cli.errors import MissingError
from deme_cli.fetch import cache_folder, sha256_of
from deme_cli.files import write_whole

_PART = 64  # names to a thread at a time
_SETTLED_NS = 2 * 10**9  # of younger files a second change could bear the very times of the first


def stamp(paths: Iterable[Path]) -> list[int]:
    """What tells a changed file without reading it: inode, size, and both times in ns."""
    found = map(os.stat, paths)
    return [n for s in found for n in (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)]


def file_digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by their name below `folder`. Raises MissingError for one that is not read.

    On two cores 1.4 GB/s the first time; later 0.1 s for 10,000 files.
    """
    stamps = {}
    for path in paths:
        try:
            stamps[path.relative_to(folder).as_posix()] = stamp([path])
        except FileNotFoundError as error:
            raise MissingError(f"{path}: no such file") from error
        except OSError as error:
            raise MissingError(f"{path}: cannot be read: {error.strerror}") from error
    digests = remembered(folder, stamps, lambda name: sha256_of(folder / name))
    return dict(zip(stamps, digests, strict=True))


def remembered(
    folder: Path, stamps: Mapping[str, Sequence[int]], make: Callable[[str], str]
) -> list[str]:
    """make(name) of every name in `folder`, or what it gave for the same stamp before.

    make: called in threads.
    """
    memory, known = _memory(folder), {}
    if memory is not None:
        known = _read(memory)
    kept = {name: known[name][1] for name in stamps if known.get(name, [None])[0] == stamps[name]}
    absent = [name for name in stamps if name not in kept]
    parts = [absent[start : start + _PART] for start in range(0, len(absent), _PART)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        values = [v for made in pool.map(lambda part: [*map(make, part)], parts) for v in made]
    made = dict(zip(absent, values, strict=True))
    settled = time.time_ns() - _SETTLED_NS
    learned = {
        name: [stamps[name], value] for name, value in made.items()
        if max(number for place, number in enumerate(stamps[name]) if place % 4 > 1) < settled
    }  # fmt: skip
    if memory is not None and learned:
        gone = [n for n in known if n not in stamps and not os.path.lexists(folder / n)]
        _write(memory, {n: v for n, v in known.items() if n not in gone} | learned)
    found = kept | made
    return [found[name] for name in stamps]


def _memory(folder: Path) -> Path | None:
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    try:
        return cache_folder() / "digests" / f"{name}.json"
    except RuntimeError:  # nobody's home folder is known
        return None


def _read(memory: Path) -> dict[str, Any]:
    """What is remembered, as far as it makes sense."""
    try:
        found = json.loads(memory.read_bytes())
        return {
            name: entry for name, entry in found.items()
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
        }  # fmt: skip
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _write(memory: Path, known: Mapping[str, Any]) -> None:
    """Remember; where the folder takes no files, all is computed again next time."""
    with contextlib.suppress(OSError, MissingError):
        write_whole(memory, [json.dumps(known).encode()])
