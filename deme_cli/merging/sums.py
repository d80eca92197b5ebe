"""One piece of a merge: sum_k c_k y_k, with y_0 the base and y_i what file i holds, or tau'_i.

Sums are carried in float32 (float64 tensors in float64). Without a transform the files are read one
after another into buffers that stay in the cache; with one all task vectors of the piece are there
at once. No torch.
n elements of a piece, at most PIECE.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deme_cli.files import DTYPE_BYTES, TensorSpec
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.differences import Differences
from deme_cli.merging.lineage import Family
from deme_cli.merging.methods.method import Method, Terms
from deme_cli.merging.pieces import (
    PIECE,
    Run,
    Sources,
    plan_runs,
    to_numbers,
)


def terms_of(family: Family, method: Method, coefficients: Coefficients) -> dict[str, Terms]:
    """The terms of each tensor of the base and each projection, by name."""
    return {spec.name: method.terms(spec.name, coefficients.of(spec.name)) for spec in family.specs}


class Sums:
    """The sums of open files, in buffers that are used again and again."""

    def __init__(self, sources: Sources, family: Family, method: Method) -> None:
        self._sources, self._transform = sources, method.transform
        self._differences = Differences(sources, family)
        self._raw = np.empty(PIECE * max(DTYPE_BYTES.values()), np.uint8)
        self._numbers = np.empty(PIECE, np.float32)

    def runs(
        self, family: Family, layout: list[TensorSpec], terms: Mapping[str, Terms]
    ) -> list[Run]:
        """`layout` in runs of equal terms; in runs of one tensor where elements are transformed."""
        if self._transform is None:
            return plan_runs(layout, family.headers, lambda spec: terms[spec.name])
        return plan_runs(layout, family.headers, lambda spec: spec.name)

    def add_up(self, run: Run, start: int, terms: Terms, total: np.ndarray) -> None:
        """Put sum_k c_k y_k of the run's elements from `start` on into `total` (n,).

        total: float32, float64 for F64.
        """
        size = len(total)
        if self._transform is not None:
            theta, taus = self._transformed(run, start, size)
        for place, (source, c) in enumerate(terms):
            if self._transform is not None:
                numbers = taus[source - 1] if source else theta
            else:
                numbers = self._read(source, run, start, size)
            if place == 0:
                np.multiply(numbers, c, out=total)
            else:
                np.multiply(numbers, c, out=numbers)
                np.add(total, numbers, out=total)

    def each(self, run: Run, start: int, out: np.ndarray) -> None:
        """Put every y_k into a row of `out` (N + 1, n)."""
        if self._transform is not None:
            out[0], out[1:] = self._transformed(run, start, out.shape[1])
        else:
            for source, row in enumerate(out):
                row[:] = self._read(source, run, start, len(row))

    def _read(self, source: int, run: Run, start: int, size: int) -> np.ndarray:
        """Numbers of one file (n,), valid until the next call."""
        raw = self._raw[: size * DTYPE_BYTES[run.dtype]]
        self._sources.read(source, run, start, raw)
        return to_numbers(raw, run.dtype, self._numbers)

    def _transformed(self, run: Run, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """theta (n,) and tau'_i (N, n) of a run of one tensor."""
        theta, taus = self._differences.read(run, start, start + size)
        if self._transform is not None:
            self._transform(run.specs[0].name, start, taus)
        return theta, taus
