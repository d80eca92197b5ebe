"""Weights in small pieces: base and experts read side by side, their differences and sums.

Pieces are small enough (PIECE elements) that a sum over many files stays in the processor's cache,
and every buffer is used again, so memory does not grow with the files or their number. Floats are
computed in float32, float64 tensors in float64. A projection that the base lacks counts as the
identity there. No torch, and bfloat16 without a library: it is the upper half of a float32.
N experts or task vectors, n elements of a piece, at most PIECE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import Self

import numpy as np

from deme_cli.errors import ArtifactError, MissingError, NumericsError
from deme_cli.files import DTYPE_BYTES, Header, TensorSpec
from deme_cli.merging.inputs import COMPUTED_IN, INTEGERS, Inputs

Terms = tuple[tuple[int, float], ...]  # (k: 0 the base, then the experts; c_k), no c_k of 0
Transform = Callable[[str, int, np.ndarray], None]  # of a tensor's tau_i from an element on
PIECE = 1 << 16  # elements: 256 KiB of float32, so that two operands stay in the cache
BLOCK = 8 * PIECE  # elements handed over to be written at once


@dataclass(frozen=True)
class Run:
    """Tensors of one dtype that lie side by side, in one order, in every file that has them.

    begins: where the run begins in each file; None in a file that lacks it.   dtypes: what it is
    there, which may be another dtype than that of the specs.
    """

    specs: tuple[TensorSpec, ...]
    begins: tuple[int | None, ...]
    dtypes: tuple[str, ...]

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
        dtypes = tuple(spec.dtype if place is None else place.dtype for place in places)
        joins = (
            begins == ends
            and (spec.dtype, dtypes) == (runs[-1].dtype, runs[-1].dtypes)
            and spec.dtype in COMPUTED_IN
            and group(spec) == group(runs[-1].specs[-1])
            and None not in begins
        )
        if joins:
            runs[-1] = Run((*runs[-1].specs, spec), runs[-1].begins, dtypes)
        else:
            runs.append(Run((spec,), begins, dtypes))
        ends = tuple(None if place is None else place.end for place in places)
    return runs


class TensorStream:
    """The base and its experts or task vectors, open side by side; what is returned is valid until
    the next call.

    transform: turns the tau_i (N, n) of the elements `start` ... of a tensor into what a method
    counts instead, in place.
    """

    def __init__(self, inputs: Inputs, transform: Transform | None = None) -> None:
        self._inputs, self.transform = inputs, transform
        self._are_vectors = [expert.is_vector for expert in inputs.experts]
        self._files: list[FileIO] = []
        self._raw = np.empty(PIECE * max(DTYPE_BYTES.values()), np.uint8)
        self._scratch = np.empty(PIECE, np.float32)
        self._buffers: dict[np.dtype, np.ndarray] = {}
        self.total = np.empty(PIECE, np.float32)  # for a sum that is not taken where it is stored

    def __enter__(self) -> Self:
        try:
            for header in self._inputs.headers:
                self._files.append(open(header.path, "rb", buffering=0))
        except OSError as error:
            self.__exit__()
            raise MissingError(f"{error.filename}: cannot be read: {error.strerror}") from error
        return self

    def __exit__(self, *error: object) -> None:
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
        file, position = self._files[source], begin + start * DTYPE_BYTES[run.dtypes[source]]
        if file.tell() != position:
            file.seek(position)
        view = out.data
        while len(view):
            count = file.readinto(view)
            if not count:
                raise ArtifactError(f"{file.name}: ended while {run.name_at(start)!r} was read")
            view = view[count:]

    def numbers(self, source: int, run: Run, start: int, size: int) -> np.ndarray:
        """What one file holds (n,), in float32, float64 for F64."""
        dtype = run.dtypes[source]
        raw = self._raw[: size * DTYPE_BYTES[dtype]]
        self.read(source, run, start, raw)
        return to_numbers(raw, dtype, self._scratch)

    def vectors(
        self, run: Run, start: int, stop: int, dtype: np.dtype | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """theta (n,) and the tau_i (N, n), not transformed, of at most PIECE elements.

        Experts are subtracted from, stored task vectors read as they are.   dtype: what to compute
        in; unset: float32, float64 for F64.
        """
        kind = COMPUTED_IN[run.dtype] if dtype is None else dtype
        if kind not in self._buffers:
            self._buffers[kind] = np.empty((len(self._are_vectors) + 1, PIECE), kind)
        numbers = self._buffers[kind][:, : stop - start]
        for source, row in enumerate(numbers):
            row[:] = self.numbers(source, run, start, stop - start)
            if source and not self._are_vectors[source - 1]:
                row -= numbers[0]
        return numbers[0], numbers[1:]

    def counted(self, run: Run, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """theta (n,) and the transformed tau_i (N, n) of a run of one tensor."""
        theta, taus = self.vectors(run, start, stop)
        if self.transform is not None:
            self.transform(run.specs[0].name, start, taus)
        return theta, taus

    def add_up(self, run: Run, start: int, terms: Terms, total: np.ndarray) -> None:
        """Put sum_k c_k y_k of the run's elements from `start` on into `total` (n,).

        y_0 is the base, y_i what file i holds or, with a transform, the transformed tau_i.
        total: float32, float64 for F64. Without a transform the files are read one after another.
        """
        if self.transform is not None:
            theta, taus = self.counted(run, start, start + len(total))
        for place, (source, c) in enumerate(terms):
            if self.transform is not None:
                numbers = taus[source - 1] if source else theta
            else:
                numbers = self.numbers(source, run, start, len(total))
            if place == 0:
                np.multiply(numbers, c, out=total)
            else:
                np.multiply(numbers, c, out=numbers)
                np.add(total, numbers, out=total)


def float_specs(inputs: Inputs) -> list[TensorSpec]:
    """The floating-point tensors of a merge: the base's, and the experts' projections."""
    return [spec for spec in inputs.specs if spec.dtype not in INTEGERS]


def float_runs(inputs: Inputs, *, by_tensor: bool = True) -> list[Run]:
    """Runs over `float_specs`, one per tensor or as long as the files allow."""
    specs = in_file_order(float_specs(inputs))
    return plan_runs(specs, inputs.headers, lambda spec: spec.name if by_tensor else None)


def in_file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """As safetensors lays tensors out: the widest first, then by name."""
    return sorted(specs, key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name))


def inner_products(
    inputs: Inputs, advance: Callable[[int], None] = lambda done: None
) -> dict[str, np.ndarray]:
    """For each tensor the (N + 1, N + 1) inner products of theta and the tau_i, in float64.

    Pairwise sums of float64 products, which come out the same on every machine (a matrix product
    would not).   advance: told the number of elements passed so far.
    Raises NumericsError naming a file and a tensor of it that is not finite.
    """
    products: dict[str, np.ndarray] = {}
    done, wide = 0, np.dtype(np.float64)
    with TensorStream(inputs) as stream, np.errstate(over="ignore", invalid="ignore"):
        for run in float_runs(inputs):
            gram = np.zeros((len(inputs.headers),) * 2)
            for start, stop in run.spans(PIECE):
                theta, taus = stream.vectors(run, start, stop, wide)
                rows = [theta, *taus]
                for i, j in zip(*np.tril_indices(len(rows)), strict=True):
                    gram[i, j] += (rows[i] * rows[j]).sum()
                done += stop - start
                advance(done)
            name = run.specs[0].name
            for header, square in zip(inputs.headers, np.diag(gram), strict=True):
                if not np.isfinite(square):
                    raise NumericsError(f"{header.path}: {name!r} is not finite")
            products[name] = np.tril(gram) + np.tril(gram, -1).T
    return products


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
