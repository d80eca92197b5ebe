"""theta_merged = theta + sum_i w_i tau_i (Eq. 8), streamed from files to a file in bounded memory.

With tau_i = theta_i - theta, experts need no subtraction: the sum is c_0 theta + sum_i w_i x_i,
where x_i is an expert's theta_i or a stored tau_i, and c_0 = 1 - sum of w_i over the experts. So
coefficients 0 copy the base bit for bit, and one expert with coefficient 1 is copied itself. Sums
are carried in float32 (float64 tensors in float64) and rounded once to the base's dtype; integers
are never averaged. Block projections count as identity matrices in the base. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deme_cli.artifacts import ArtifactWriter
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.merging.lineage import Family, is_projection, open_family, open_parents
from deme_cli.merging.pieces import (
    BLOCK,
    COMPUTED_IN,
    INTEGERS,
    PIECE,
    Run,
    Sources,
    WriteBehind,
    plan_runs,
    to_bytes,
    to_numbers,
)
from deme_cli.records import MergedRecord
from deme_cli.tensor_file import DTYPE_BYTES, TensorSpec

Terms = list[tuple[int, float]]  # (number of the file: 0 the base, then the parents; coefficient)


def merge_artifacts(
    base: Path, parents: Sequence[Path], coefficients: Sequence[float], output: Path
) -> MergedRecord:
    """Merge experts or task vectors with their base into `output` (Eq. 8).

    Raises ArtifactError, ConfigError or NumericsError; then no output appears.
    """
    family = open_family(base, open_parents(parents, "expert", "task-vector"))
    return merge_family(family, coefficients, output)


def merge_family(
    family: Family,
    coefficients: Sequence[float],
    output: Path,
    *,
    search: dict[str, Any] | None = None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> MergedRecord:
    """The same for checked headers.

    `search` goes into the record; `advance` is told the number of bytes written so far.
    """
    terms = linear_terms(family, coefficients)
    layout = merged_layout(family, terms)
    runs = plan_runs(layout, family.headers)
    record = _merged_record(family, coefficients, layout, search)
    written = 0
    with (
        Sources(family.headers) as sources,
        ArtifactWriter(output, layout, record) as writer,
        WriteBehind(writer.write, BLOCK * max(DTYPE_BYTES.values())) as behind,
        np.errstate(over="ignore", invalid="ignore"),  # looked for in the result
    ):
        sums = _Sums(sources, family, terms, output)
        for run in runs:
            for start, stop in run.spans(BLOCK):
                block = behind.block()
                num_bytes = (stop - start) * DTYPE_BYTES[run.dtype]
                sums.fill(run, start, block[:num_bytes])
                behind.put(block, num_bytes)
                written += num_bytes
                advance(written)
    assert isinstance(writer.record, MergedRecord)
    return writer.record


def linear_terms(family: Family, coefficients: Sequence[float]) -> Terms:
    """Files and coefficients whose sum is Eq. 8, those with coefficient 0 left out.

    c_0 is taken as 0 where it is only the rounding of the coefficients (three times 1/3).
    Raises ConfigError on a wrong count or a coefficient that is not a finite number.
    """
    if len(coefficients) != len(family.parents):
        raise ConfigError(
            f"{len(coefficients)} coefficients for {len(family.parents)} experts; give one for each"
        )
    if not np.isfinite(coefficients).all():
        raise ConfigError(f"coefficients {list(coefficients)}: expected finite numbers")
    weights = [w for w, parent in zip(coefficients, family.parents, strict=True)
               if not parent.is_vector]  # fmt: skip
    c_0 = 1.0 - sum(weights)
    if abs(c_0) <= len(weights) * np.finfo(np.float64).eps:
        c_0 = 0.0
    return [(source, w) for source, w in enumerate([c_0, *map(float, coefficients)]) if w != 0]


def merged_layout(family: Family, terms: Terms) -> list[TensorSpec]:
    """The tensors of the merged file: the base's, and the projections unless nothing moves them.

    Raises ArtifactError naming a tensor whose dtype has no arithmetic here.
    """
    projections = [] if terms == [(0, 1.0)] else family.projections
    specs = [*family.base.tensors.values(), *projections]
    for spec in specs:
        known = COMPUTED_IN if spec in projections else COMPUTED_IN.keys() | INTEGERS
        if spec.dtype not in known:
            raise ArtifactError(
                f"{family.base.path}: {spec.name!r} of {spec.dtype} cannot be merged"
            )
    return sorted(specs, key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name))


class _Sums:
    """Linear combinations of pieces, computed in buffers that are used again and again."""

    def __init__(self, sources: Sources, family: Family, terms: Terms, output: Path) -> None:
        self._sources, self._family, self._terms = sources, family, terms
        self._output = output
        self._raw = np.empty(PIECE * max(DTYPE_BYTES.values()), np.uint8)
        self._numbers = np.empty(PIECE, np.float32)
        self._total = np.empty(PIECE, np.float32)

    def fill(self, run: Run, start: int, out: np.ndarray) -> None:
        """Put the merged elements of `run` from `start` on into the bytes `out`."""
        if run.dtype in INTEGERS:
            self._copy_equal(run, start, out)
        elif len(self._terms) == 1 and self._terms[0][1] == 1:
            self._sources.read(self._terms[0][0], run, start, out)
        else:
            size = PIECE * DTYPE_BYTES[run.dtype]
            for offset in range(0, out.size, size):
                self._add_up(run, start, out[offset : offset + size])
                start += PIECE

    def _add_up(self, run: Run, start: int, out: np.ndarray) -> None:
        """c_0 theta + sum_i w_i x_i for at most PIECE elements."""
        raw = self._raw[: out.size]
        in_place = run.dtype in ("F32", "F64")
        total = out.view(COMPUTED_IN[run.dtype]) if in_place else self._total[: out.size // 2]
        for place, (source, w) in enumerate(self._terms):
            self._sources.read(source, run, start, raw)
            numbers = to_numbers(raw, run.dtype, self._numbers)
            if place == 0:
                np.multiply(numbers, w, out=total)
            else:
                np.multiply(numbers, w, out=numbers)
                np.add(total, numbers, out=total)
        if not in_place:
            to_bytes(total, run.dtype, out)
            total = to_numbers(out, run.dtype, self._numbers)
        if not np.isfinite(total).all():
            name = run.name_at(start + int(np.isfinite(total).argmin()))
            raise NumericsError(
                f"{self._output}: {name!r} would not be finite in {run.dtype}; "
                f"look for NaN in the experts, or take smaller coefficients"
            )

    def _copy_equal(self, run: Run, start: int, out: np.ndarray) -> None:
        """The base's integers, after a check that no expert has changed them."""
        self._sources.read(0, run, start, out)
        other = np.empty_like(out)
        for source, parent in enumerate(self._family.parents, start=1):
            self._sources.read(source, run, start, other)
            if other.any() if parent.is_vector else not np.array_equal(other, out):
                raise ArtifactError(
                    f"{parent.path}: {run.name_at(start)!r} of integers ({run.dtype}) differs from "
                    f"{self._family.base.path}; integers cannot be averaged"
                )


def _merged_record(
    family: Family,
    coefficients: Sequence[float],
    layout: Sequence[TensorSpec],
    search: dict[str, Any] | None,
) -> MergedRecord:
    """Where the merged file comes from; `parents` in the order of `coefficients`."""
    base = family.base_record
    placements = {parent.record.projection for parent in family.parents}
    plain = not any(is_projection(spec.name) for spec in layout)
    if plain and "block" in placements:
        placements = {"none"}  # every coefficient is 0: the base itself
    return MergedRecord(
        source=base.source,
        model_config=base.model_config,
        scheduler_config=base.scheduler_config,
        num_train_timesteps=base.num_train_timesteps,
        companions=base.companions or family.parents[0].record.companions,
        base=base.fingerprint,
        parents=[
            {
                "path": str(parent.path),
                "kind": parent.record.kind,
                "fingerprint": parent.record.fingerprint,
                "range": parent.record.range,
            }
            for parent in family.parents
        ],
        coefficients=[float(w) for w in coefficients],
        method="linear",
        projection=placements.pop() if len(placements) == 1 else "mixed",
        search=search,
    )
