"""Weights in small pieces: base and experts read side by side, their differences and sums.

Pieces are small enough (PIECE elements) that a sum over many files stays in the processor's cache,
and every buffer is used again, so memory does not grow with the files or their number. Floats are
computed in float32, float64 tensors in float64. `TensorStream.numbers` is the one door by which an
input comes in: what it says of a tensor, or stands for where its file lacks it. No torch, and
bfloat16 without a library: it is the upper half of a float32.
N experts or task vectors, n elements of a piece, at most PIECE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np

from deme_cli.errors import ArtifactError, NumericsError, reading
from deme_cli.files import DTYPE_BYTES, Header, TensorSpec
from deme_cli.merging.inputs import COMPUTED_IN, INTEGERS, Inputs, changed_by

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

    dtype: str
    specs: tuple[TensorSpec, ...]
    begins: tuple[int | None, ...]
    dtypes: tuple[str, ...]

    def spans(self, num_elements: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of consecutive spans of at most `num_elements` elements."""
        size = sum(spec.num_elements for spec in self.specs)
        for start in range(0, size, num_elements):
            yield start, min(start + num_elements, size)

    def name_at(self, element: int) -> str:
        """The tensor that holds this element."""
        for spec in self.specs:
            if element < spec.num_elements:
                return spec.name
            element -= spec.num_elements
        raise AssertionError("element past the run")


def plan_runs(
    layout: Iterable[TensorSpec],
    headers: Sequence[Header],
    group: Callable[[TensorSpec], object] = lambda spec: None,
) -> list[Run]:
    """`layout` in as few runs as the files allow; a run never mixes dtypes or values of `group`.

    Integer tensors stand alone, so that a disagreement can be named.
    """
    runs: list[Run] = []
    ends: tuple[int | None, ...] = ()
    last = None
    for spec in layout:
        places = [header.tensors.get(spec.name) for header in headers]
        begins = tuple(place.begin if place else None for place in places)
        dtypes = tuple(place.dtype if place else spec.dtype for place in places)
        kind = (spec.dtype, dtypes, group(spec))
        if kind == last and begins == ends and spec.dtype in COMPUTED_IN and None not in begins:
            runs[-1] = Run(spec.dtype, (*runs[-1].specs, spec), runs[-1].begins, dtypes)
        else:
            runs.append(Run(spec.dtype, (spec,), begins, dtypes))
        last, ends = kind, tuple(place.end if place else None for place in places)
    return runs


class TensorStream:
    """The base and its experts or task vectors, open side by side; what is returned is valid until
    the next call.

    transform: turns the tau_i (N, n) of the elements `start` ... of a tensor into what a method
    counts instead, in place.
    """

    def __init__(self, inputs: Inputs, transform: Transform | None = None) -> None:
        self._inputs, self.transform = inputs, transform
        self._raw = np.empty(PIECE * max(DTYPE_BYTES.values()), np.uint8)
        self._scratch = np.empty(PIECE, np.float32)
        self._buffers: dict[np.dtype, np.ndarray] = {}
        self._products = {
            source: Products(expert.header)
            for source, expert in enumerate(inputs.experts, start=1) if expert.holds_adapters
        }  # fmt: skip

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self._files = []
            for path in [header.path for header in self._inputs.headers]:
                with reading(path):
                    self._files.append(opened.enter_context(open(path, "rb", buffering=0)))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def numbers(self, source: int, run: Run, start: int, size: int) -> np.ndarray:
        """What an input says of the run's elements from `start` on: (n,) float32, float64 for F64.

        An expert gives its weights, a task vector its differences (`Expert.is_vector`), as does one
        that holds adapters: their product. Where another file lacks the run, it stands for an
        identity matrix (a projection the base has not).
        """
        dtype = run.dtypes[source]
        if run.begins[source] is None:
            if source in self._products:
                return self._products[source].numbers(run.specs[0], start, size)
            numbers, width = np.zeros(size, COMPUTED_IN[dtype]), run.specs[0].shape[0]
            numbers[-start % (width + 1) :: width + 1] = 1
            return numbers
        raw = self._raw[: size * DTYPE_BYTES[dtype]]
        self.read(source, run, start, raw)
        return to_numbers(raw, dtype, self._scratch)

    def read(self, source: int, run: Run, start: int, out: np.ndarray) -> None:
        """Fill the uint8 array `out` with the bytes of an input from element `start` of the run on.

        Raises ArtifactError if the file ends too early.
        """
        begin, dtype = run.begins[source], run.dtypes[source]
        if begin is None:
            size = out.size // DTYPE_BYTES[dtype]
            if dtype in INTEGERS:  # that no adapter changes
                out[:] = 0
                return
            to_bytes(self.numbers(source, run, start, size), dtype, out)
            return
        file, position = self._files[source], begin + start * DTYPE_BYTES[dtype]
        if file.tell() != position:
            file.seek(position)
        view = out.data
        while len(view):
            count = file.readinto(view)
            if not count:
                raise ArtifactError(f"{file.name}: ended while {run.name_at(start)!r} was read")
            view = view[count:]

    def vectors(
        self, run: Run, start: int, stop: int, dtype: np.dtype | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """theta (n,) and the tau_i (N, n) of at most PIECE elements, transformed if they are to be;
        then the run is of one tensor.

        Experts are subtracted from, stored task vectors read as they are.   dtype: what to compute
        in; unset: float32, float64 for F64.
        """
        kind = COMPUTED_IN[run.dtype] if dtype is None else dtype
        experts = self._inputs.experts
        if kind not in self._buffers:
            self._buffers[kind] = np.empty((len(experts) + 1, PIECE), kind)
        theta, *taus = rows = self._buffers[kind][:, : stop - start]
        theta[:] = self.numbers(0, run, start, stop - start)
        for source, (expert, tau) in enumerate(zip(experts, taus, strict=True), start=1):
            tau[:] = self.numbers(source, run, start, stop - start)
            if not expert.is_vector:
                tau -= theta
        if self.transform is not None:
            self.transform(run.specs[0].name, start, rows[1:])
        return theta, rows[1:]

    def add_up(self, run: Run, start: int, terms: Terms, total: np.ndarray) -> None:
        """Put sum_k c_k y_k of the run's elements from `start` on into `total` (n,).

        y_0 is the base, y_i what input i says or, with a transform, the transformed tau_i.
        total: float32, float64 for F64. Without a transform the files are read one after another.
        """
        if self.transform is not None:
            theta, taus = self.vectors(run, start, start + len(total))
        for place, (source, c) in enumerate(terms):
            if self.transform is not None:
                numbers = taus[source - 1] if source else theta
            else:
                numbers = self.numbers(source, run, start, len(total))
            np.multiply(numbers, c, out=numbers if place else total)
            if place:
                np.add(total, numbers, out=total)


class Products:
    """B A of the adapters in a file, computed where it is asked for, in float32.

    Rows go together in blocks with edges of their own, so that no number depends on how a tensor is
    cut into pieces: a product of matrices rounds by the number of its rows.
    """

    def __init__(self, header: Header) -> None:
        self._factors = dict[str, np.ndarray]()
        with reading(header.path), open(header.path, "rb") as file:
            for name, spec in header.tensors.items():
                file.seek(spec.begin)
                raw = np.frombuffer(file.read(spec.num_bytes), np.uint8)
                numbers = to_numbers(raw, spec.dtype, np.empty(spec.num_elements, np.float32))
                self._factors[name] = numbers.reshape(spec.shape[0], -1).astype(np.float32)
        self._names = changed_by(header)
        self._last: tuple[str, int, np.ndarray] = "", 0, np.empty(0)

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A (r, n) and B (out, r) of a tensor that has an adapter."""
        down, up = (self._factors[side] for side in self._names[name])
        return down, up

    def numbers(self, spec: TensorSpec, start: int, size: int) -> np.ndarray:
        """The elements of a tensor's change from `start` on: zeros where no adapter is."""
        found = np.zeros(size, COMPUTED_IN[spec.dtype])
        if spec.name in self._names:
            down, up = self.factors(spec.name)
            width = down.shape[1]
            block = max(BLOCK // width, 1) * width
            for begin in range(start // block * block, start + size, block):
                if self._last[:2] != (spec.name, begin):
                    rows = up[begin // width : (begin + block) // width]
                    self._last = spec.name, begin, (rows @ down).reshape(-1)
                first, last = max(start, begin), min(start + size, begin + block)
                found[first - start : last - start] = self._last[2][first - begin : last - begin]
        return found


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
