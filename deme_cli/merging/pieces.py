"""Weights in small pieces: reading several files side by side, and numbers from and to their bytes.

Pieces are small enough (PIECE elements) that a sum over many files stays in the processor's cache,
and every buffer is used again, so memory does not grow with the files or their number. Floats are
computed in float32, float64 tensors in float64. No torch, and bfloat16 without a library: it is the
upper half of a float32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from types import TracebackType
from typing import Any

import numpy as np

from deme_cli.errors import ArtifactError, MissingError
from deme_cli.files import DTYPE_BYTES, Header, TensorSpec

PIECE = 1 << 16  # elements: 256 KiB of float32, so that two operands stay in the cache
BLOCK = 8 * PIECE  # elements handed over to be written at once
COMPUTED_IN: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f4"), "BF16": np.dtype("<f4"),
}  # fmt: skip
INTEGERS = frozenset({"I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL"})


@dataclass(frozen=True)
class Run:
    """Tensors of one dtype that lie side by side, in one order, in every file that has them.

    begins: where the run begins in each file; None in a file that lacks it.
    """

    specs: tuple[TensorSpec, ...]
    begins: tuple[int | None, ...]

    @property
    def dtype(self) -> str:
        return self.specs[0].dtype

    @property
    def num_elements(self) -> int:
        return sum(spec.num_elements for spec in self.specs)

    def spans(self, num_elements: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of consecutive spans of at most `num_elements` elements."""
        for start in range(0, self.num_elements, num_elements):
            yield start, min(start + num_elements, self.num_elements)

    def name_at(self, element: int) -> str:
        """The tensor that holds this element."""
        for spec in self.specs:
            if element < spec.num_elements:
                return spec.name
            element -= spec.num_elements
        raise AssertionError("element past the run")


def plan_runs(
    layout: Sequence[TensorSpec],
    headers: Sequence[Header],
    group: Callable[[TensorSpec], object] = lambda spec: None,
) -> list[Run]:
    """`layout` in as few runs as the files allow; a run never mixes dtypes or values of `group`.

    Integer tensors stand alone, so that a disagreement can be named.
    """
    runs: list[Run] = []
    ends: tuple[int | None, ...] = ()
    for spec in layout:
        places = [header.tensors.get(spec.name) for header in headers]
        begins = tuple(None if place is None else place.begin for place in places)
        joins = (
            begins == ends
            and spec.dtype == runs[-1].dtype
            and spec.dtype in COMPUTED_IN
            and group(spec) == group(runs[-1].specs[-1])
            and None not in begins
        )
        if joins:
            runs[-1] = Run((*runs[-1].specs, spec), runs[-1].begins)
        else:
            runs.append(Run((spec,), begins))
        ends = tuple(None if place is None else place.end for place in places)
    return runs


class Sources:
    """Open weight files read side by side into buffers of the caller."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self._headers = list(headers)
        self._files: list[FileIO] = []

    def __enter__(self) -> Sources:
        try:
            for header in self._headers:
                self._files.append(open(header.path, "rb", buffering=0))
        except OSError as error:
            self._close()
            raise MissingError(f"{error.filename}: cannot be read: {error.strerror}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        for file in self._files:
            file.close()

    def read(self, source: int, run: Run, start: int, out: np.ndarray) -> None:
        """Fill the uint8 array `out` with the run's bytes in file `source`, from element `start`.

        Where the file lacks the run, it stands for an identity matrix (a projection the base has
        not). Raises ArtifactError if the file ends too early.
        """
        begin = run.begins[source]
        if begin is None:
            _fill_identity(run.specs[0], start, out)
            return
        file, position = self._files[source], begin + start * DTYPE_BYTES[run.dtype]
        if file.tell() != position:
            file.seek(position)
        view = out.data
        while len(view):
            count = file.readinto(view)
            if not count:
                raise ArtifactError(f"{file.name}: ended while {run.name_at(start)!r} was read")
            view = view[count:]


def _fill_identity(spec: TensorSpec, start: int, out: np.ndarray) -> None:
    """Elements `start` ... of the flattened identity matrix of the spec's shape, as its bytes."""
    width = spec.shape[0]
    values = np.zeros(out.size // DTYPE_BYTES[spec.dtype], COMPUTED_IN[spec.dtype])
    values[-start % (width + 1) :: width + 1] = 1
    to_bytes(values, spec.dtype, out)


def to_numbers(raw: np.ndarray, dtype: str, scratch: np.ndarray) -> np.ndarray:
    """The numbers that bytes stand for, as float32 (float64 for F64).

    raw: uint8. F32 and F64 are seen in place; F16 and BF16 are put into `scratch` (float32).
    """
    if dtype in ("F32", "F64"):
        return raw.view(COMPUTED_IN[dtype])
    numbers = scratch[: raw.size // 2]
    if dtype == "F16":
        numbers[:] = raw.view("<f2")
    else:
        bits = numbers.view("<u4")
        bits[:] = raw.view("<u2")
        bits <<= 16
    return numbers


def to_bytes(numbers: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Write numbers as bytes of `dtype` into the uint8 array `out`, rounded to nearest even."""
    if dtype == "BF16":
        bits = numbers.view("<u4")
        odd = (bits >> 16) & 1
        out.view("<u2")[:] = (bits + (odd + 0x7FFF)) >> 16
    else:
        out.view("<f2" if dtype == "F16" else COMPUTED_IN[dtype])[:] = numbers


class WriteBehind:
    """Hands blocks to `write` on a thread of its own while the next block is computed.

    `block()` gives a uint8 buffer to fill, `put` hands it over; `depth` buffers go round. Leaving
    waits for what is under way; an error of `write` is raised by the next call.
    """

    def __init__(self, write: Callable[[np.ndarray], None], num_bytes: int, depth: int = 3) -> None:
        self._write = write
        self._free = [np.empty(num_bytes, np.uint8) for _ in range(depth)]
        self._pending: deque[tuple[Future[None], np.ndarray]] = deque()

    def __enter__(self) -> WriteBehind:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deme-write")
        return self

    def block(self) -> np.ndarray:
        """A buffer that nobody reads any more."""
        if not self._free:
            self._finish_one()
        return self._free.pop()

    def put(self, block: np.ndarray, num_bytes: int) -> None:
        """Write the first `num_bytes` of a buffer got from `block()`."""
        self._pending.append((self._pool.submit(self._write, block[:num_bytes]), block))

    def _finish_one(self) -> None:
        future, block = self._pending.popleft()
        future.result()
        self._free.append(block)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            while kind is None and self._pending:
                self._finish_one()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
