"""theta and the tau_i = theta_i - theta side by side, piece by piece, in buffers used again.

Experts are subtracted from, stored task vectors read as they are; a projection that the base lacks
counts as the identity there. Sums over all elements are pairwise sums of float64 products, which
come out the same on every machine (a matrix product would not). No torch.
N parents, n elements of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from deme_cli.errors import NumericsError
from deme_cli.files import DTYPE_BYTES, TensorSpec
from deme_cli.merging.lineage import Family
from deme_cli.merging.pieces import (
    COMPUTED_IN,
    INTEGERS,
    PIECE,
    Run,
    Sources,
    plan_runs,
    to_numbers,
)


def float_specs(family: Family) -> list[TensorSpec]:
    """The floating-point tensors of a merge: the base's, and the experts' projections."""
    return [spec for spec in family.specs if spec.dtype not in INTEGERS]


def float_runs(family: Family, *, by_tensor: bool = True) -> list[Run]:
    """Runs over `float_specs`, one per tensor or as long as the files allow."""
    specs = sorted(float_specs(family), key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name))
    if not by_tensor:
        return plan_runs(specs, family.headers)
    return plan_runs(specs, family.headers, lambda spec: spec.name)


class Differences:
    """Reads pieces of at most PIECE elements; what it returns is valid until the next call."""

    def __init__(self, sources: Sources, family: Family) -> None:
        self._sources = sources
        self._are_vectors = [parent.is_vector for parent in family.parents]
        self._raw = np.empty(PIECE * max(DTYPE_BYTES.values()), np.uint8)
        self._scratch = np.empty(PIECE, np.float32)
        self._buffers: dict[np.dtype, np.ndarray] = {}

    def read(
        self, run: Run, start: int, stop: int, dtype: np.dtype | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """theta (n,) and tau (N, n) of elements start .. stop - 1.

        dtype: what to compute in; unset: float32, float64 for F64.
        """
        kind = COMPUTED_IN[run.dtype] if dtype is None else dtype
        if kind not in self._buffers:
            self._buffers[kind] = np.empty((len(self._are_vectors) + 1, PIECE), kind)
        numbers = self._buffers[kind][:, : stop - start]
        raw = self._raw[: (stop - start) * DTYPE_BYTES[run.dtype]]
        for source, row in enumerate(numbers):
            self._sources.read(source, run, start, raw)
            row[:] = to_numbers(raw, run.dtype, self._scratch)
            if source and not self._are_vectors[source - 1]:
                row -= numbers[0]
        return numbers[0], numbers[1:]


def inner_products(family: Family, *, of_weights: bool = False) -> dict[str, np.ndarray]:
    """For each tensor the (N, N) inner products of the tau_i, or of the theta_i, in float64.

    Raises NumericsError naming an expert and a tensor that is not finite.
    """
    count = len(family.parents)
    products: dict[str, np.ndarray] = {}
    with Sources(family.headers) as sources, np.errstate(over="ignore", invalid="ignore"):
        differences = Differences(sources, family)
        for run in float_runs(family):
            gram = np.zeros((count, count))
            for start, stop in run.spans(PIECE):
                theta, vectors = differences.read(run, start, stop, np.dtype(np.float64))
                if of_weights:
                    vectors += theta
                for i in range(count):
                    for j in range(i + 1):
                        gram[i, j] += (vectors[i] * vectors[j]).sum()
            name = run.specs[0].name
            for parent, square in zip(family.parents, np.diag(gram), strict=True):
                if not np.isfinite(square):
                    raise NumericsError(f"{parent.path}: {name!r} is not finite")
            products[name] = np.tril(gram) + np.tril(gram, -1).T
    return products


def vector_pieces(family: Family, runs: list[Run]) -> Callable[[], Iterator[np.ndarray]]:
    """A function that starts another walk over the tau_i (N, n) of `runs`, piece by piece."""

    def walk() -> Iterator[np.ndarray]:
        with Sources(family.headers) as sources:
            differences = Differences(sources, family)
            for run in runs:
                for start, stop in run.spans(PIECE):
                    yield differences.read(run, start, stop)[1]

    return walk
