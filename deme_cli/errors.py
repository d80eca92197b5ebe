"""Failures the user can act on. One class per exit code (`deme` prints the message, no traceback).

A message says where, what was expected, what was found and what to do; lower case, no period.
Anything that is not a `DemeError` is a bug and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DemeError(Exception):
    """Something the user can mend; `exit_code` is what the process ends with."""

    exit_code = 1


class ConfigError(DemeError):
    """Wrong usage or configuration."""

    exit_code = 2


class MissingError(DemeError):
    """A file, dataset, weight, hub or disk that is needed is missing or unreachable."""

    exit_code = 3


class ArtifactError(DemeError):
    """An artifact or data is wrong: corrupt, mismatched, or of another base."""

    exit_code = 4


class NumericsError(DemeError):
    """The numbers failed: NaN, a non-finite loss or distance."""

    exit_code = 5


class GateError(DemeError):
    """A gate such as `eval --max-fid` was not met."""

    exit_code = 6


class Stopped(DemeError):
    """A signal ended the run, its state saved: 75 for SIGTERM and SIGUSR1, 130 for Ctrl-C."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_STORAGE_ADVICE = {
    errno.ENOSPC: "no space left on the disk; free some or choose another place with --output",
    errno.EDQUOT: "the disk quota is used up; free some or choose another place with --output",
    errno.EACCES: "no permission to write there; choose another place with --output",
    errno.EPERM: "no permission to write there; choose another place with --output",
    errno.EROFS: "the file system is read-only; choose another place with --output",
    errno.EFBIG: "the file system takes no file this large; choose another place with --output",
    errno.EEXIST: "part of this path is a file, not a folder; choose another place with --output",
    errno.ENOTDIR: "part of this path is a file, not a folder; choose another place with --output",
    errno.EISDIR: "a folder of this name exists; choose another place with --output",
    errno.ENOTEMPTY: "a folder of this name exists; choose another place with --output",
    errno.ENOENT: "this place takes no files; choose another place with --output",
    errno.EINVAL: "this place takes no files; choose another place with --output",
    errno.ELOOP: "links in this path go in a circle; choose another place with --output",
    errno.ENAMETOOLONG: "the name is too long for the disk; choose a shorter one with --output",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate what the operating system says while `path` is written into a `MissingError`."""
    try:
        yield
    except OSError as error:
        advice = _STORAGE_ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        raise MissingError(f"{path}: {advice}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Translate what the operating system says while `path` is read into a `MissingError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file") from error
    except PermissionError as error:
        raise MissingError(f"{path}: no permission to read it") from error
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}") from error


_OUT_OF_MEMORY = (  # what a RuntimeError says; accelerate's `should_reduce_batch_size` knows fewer
    "out of memory",  # torch's allocators of CUDA, HIP, XPU and MPS; CUDA's own error 2
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE, which allocate beside torch
    "ALLOCATION_FAILED",  # the same of cuDNN since 9
    "Invalid buffer size: ",  # MPS, of a tensor larger than a Metal buffer may be
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # Windows
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is how torch says that a device, or the processor, has too little memory."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


@contextmanager
def out_of_memory_as(message: str) -> Iterator[None]:
    """Translate a lack of memory into a `MissingError` that says `message`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MissingError(message) from error
