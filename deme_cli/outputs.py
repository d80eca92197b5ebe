"""Places for results: checked before work, claimed during it, filled whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli.errors import ConfigError, MissingError, writing

if TYPE_CHECKING:
    from filelock import BaseFileLock

_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def require_output(path: Path, *, force: bool) -> None:
    """Check that `path` may be written: absent or `force`, in a folder that takes files."""
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file with --output")
        if path.exists() and not force:
            raise ConfigError(
                f"{path} exists; add --force to replace it, or choose another --output"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f".{path.name}.{os.getpid()}.probe"
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


def require_space(path: Path, num_bytes: int) -> None:
    """Check that the disk of `path` has room for `num_bytes`; raises MissingError if not."""
    import shutil

    folder = Path(os.path.realpath(path)).parent  # unlike `resolve`, content with a link to itself
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MissingError(
            f"{path}: needs {num_bytes / 1e6:,.2f} MB, the disk has {free / 1e6:,.2f} MB free; "
            f"free some space or choose another --output"
        )


def file_lock(path: Path) -> BaseFileLock:
    """A lock on the file at `path`: the system's, which goes with the process that holds it.

    Where the file system has none (some NFS, FUSE and parallel ones) the file notes its holder,
    who is known to be gone on the same host alone; `holder_of` then says what to remove.
    """
    from filelock import FileLock, SoftFileLock

    kind = FileLock if _has_flock(path.parent) else SoftFileLock
    return kind(path, thread_local=False)


def _has_flock(folder: Path) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return False
            raise
    return True


def holder_of(path: Path) -> str:
    """The process that a lock's file names, and what helps if that is gone; "" if it names none."""
    with suppress(OSError, ValueError):
        match path.read_text().split():
            case [process, host, *_]:
                return f" (process {process} on {host}; if that is gone, remove {path})"
    return ""


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold the right to write `path`. Raises ConfigError while another process holds it."""
    from filelock import Timeout

    path = Path(path)
    lock_path = path.parent / f".{path.name}.lock"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = file_lock(lock_path)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{path} is being written by another deme process{holder_of(lock_path)}; wait for "
                f"it or use --output"
            ) from error
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        lock.release()


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a plain file (PNG, TOML, JSON) so that it appears whole or not at all."""
    path = Path(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def shown_path(path: Path) -> Path:
    """As seen from the current folder, where it lies below."""
    here, path = Path.cwd(), Path(path)
    return path.relative_to(here) if path.is_relative_to(here) else path
