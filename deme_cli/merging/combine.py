"""theta_merged = theta + sum_i w_i tau_i (Eq. 8), streamed from files to a file in bounded memory.

What varies between methods is the list of terms of each tensor, and what becomes of the tau_i
before (methods/); the rest is one engine. Sums are carried in float32 (float64 tensors in float64)
and rounded once to the base's dtype; integers are never averaged. Block projections count as
identity matrices in the base. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deme_cli.artifacts import ArtifactWriter, MergedRecord
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.files import DTYPE_BYTES, TensorSpec
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.lineage import Family, is_projection, open_family, open_parents
from deme_cli.merging.merged_record import merged_record
from deme_cli.merging.methods.known import LINEAR, MethodSettings, fit_coefficients, open_method
from deme_cli.merging.methods.method import BASE, Method, Terms
from deme_cli.merging.pieces import (
    BLOCK,
    COMPUTED_IN,
    INTEGERS,
    PIECE,
    Run,
    Sources,
    WriteBehind,
    to_bytes,
    to_numbers,
)
from deme_cli.merging.sums import Sums, terms_of

Advance = Callable[[int], None]


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
    coefficients: Coefficients | Sequence[float] | None,
    output: Path,
    *,
    method: MethodSettings = LINEAR,
    search: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
    advance: Advance = lambda num_bytes: None,
) -> MergedRecord:
    """The same for checked headers, by any method, with coefficients that may differ by tensor.

    coefficients: None for 1/N each, and for a method that finds its own.   `search` and `report` go
    into the record; `advance` is told the number of bytes written so far.
    """
    plan = plan_merge(family, coefficients, method)
    return write_merge(plan, _record_of(plan, method, search, report), output, advance)


@dataclass(frozen=True)
class Plan:
    """A merge that is ready to be written: the terms of each tensor, and the order of the file."""

    family: Family
    coefficients: Coefficients
    method: Method
    terms: dict[str, Terms]
    layout: list[TensorSpec]


def plan_merge(
    family: Family,
    coefficients: Coefficients | Sequence[float] | None,
    method: MethodSettings = LINEAR,
) -> Plan:
    """Everything that is known before the first byte is written.

    Raises ConfigError where the coefficients do not fit, ArtifactError naming a tensor whose dtype
    has no arithmetic here.
    """
    given = fit_coefficients(family, coefficients, method)
    _require_arithmetic(family)
    opened = open_method(family, method)
    terms = terms_of(family, opened, given)
    return Plan(family, given, opened, terms, _layout(family, terms))


def write_merge(
    plan: Plan, record: MergedRecord, output: Path, advance: Advance = lambda num_bytes: None
) -> MergedRecord:
    """Write the merged tensors under `record`; returns it with the fingerprint they have."""
    written = 0
    with (
        Sources(plan.family.headers) as sources,
        ArtifactWriter(output, plan.layout, record) as writer,
        WriteBehind(writer.write, BLOCK * max(DTYPE_BYTES.values())) as behind,
        np.errstate(over="ignore", invalid="ignore"),  # looked for in the result
    ):
        engine = _Engine(sources, plan, output)
        for run in engine.runs():
            for start, stop in run.spans(BLOCK):
                block = behind.block()
                num_bytes = (stop - start) * DTYPE_BYTES[run.dtype]
                engine.fill(run, start, block[:num_bytes])
                behind.put(block, num_bytes)
                written += num_bytes
                advance(written)
    assert isinstance(writer.record, MergedRecord)
    return writer.record


def _require_arithmetic(family: Family) -> None:
    """Check that every tensor can be added up, or is of integers, which are copied."""
    for spec in family.specs:
        if spec.dtype not in COMPUTED_IN and (
            spec.dtype not in INTEGERS or is_projection(spec.name)
        ):
            raise ArtifactError(
                f"{family.base.path}: {spec.name!r} of {spec.dtype} cannot be merged"
            )


def _layout(family: Family, terms: dict[str, Terms]) -> list[TensorSpec]:
    """The tensors of the merged file: the base's, and the projections unless nothing moves them."""
    moved = any(terms[spec.name] != BASE for spec in family.projections)
    specs = [*family.base.tensors.values(), *(family.projections if moved else [])]
    return sorted(specs, key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name))


class _Engine:
    """The bytes of merged runs."""

    def __init__(self, sources: Sources, plan: Plan, output: Path) -> None:
        self._sources, self._plan, self._output = sources, plan, output
        self._sums = Sums(sources, plan.family, plan.method)
        self._numbers = np.empty(PIECE, np.float32)
        self._total = np.empty(PIECE, np.float32)

    def runs(self) -> list[Run]:
        return self._sums.runs(self._plan.family, self._plan.layout, self._plan.terms)

    def fill(self, run: Run, start: int, out: np.ndarray) -> None:
        """Put the merged elements of `run` from `start` on into the bytes `out`."""
        terms = self._plan.terms[run.specs[0].name]
        is_file = terms == BASE or (self._plan.method.transform is None and len(terms) == 1)
        if run.dtype in INTEGERS:
            self._copy_equal(run, start, out)
        elif is_file and terms[0][1] == 1:
            self._sources.read(terms[0][0], run, start, out)
            self._require_finite(run, start, out)
        else:
            size = PIECE * DTYPE_BYTES[run.dtype]
            for offset in range(0, out.size, size):
                self._add_up(run, start, terms, out[offset : offset + size])
                start += PIECE

    def _add_up(self, run: Run, start: int, terms: Terms, out: np.ndarray) -> None:
        """sum_k c_k y_k for at most PIECE elements."""
        in_place = run.dtype in ("F32", "F64")
        total = out.view(COMPUTED_IN[run.dtype]) if in_place else self._total[: out.size // 2]
        self._sums.add_up(run, start, terms, total)
        if not in_place:
            to_bytes(total, run.dtype, out)
        self._require_finite(run, start, out)

    def _require_finite(self, run: Run, start: int, out: np.ndarray) -> None:
        """Raises NumericsError naming the first tensor with a number in `out` that is not."""
        size = PIECE * DTYPE_BYTES[run.dtype]
        for offset in range(0, out.size, size):
            numbers = to_numbers(out[offset : offset + size], run.dtype, self._numbers)
            finite = np.isfinite(numbers)
            if not finite.all():
                name = run.name_at(start + int(finite.argmin()))
                raise NumericsError(
                    f"{self._output}: {name!r} would not be finite in {run.dtype}; "
                    f"look for NaN in the experts, or take smaller coefficients"
                )
            start += PIECE

    def _copy_equal(self, run: Run, start: int, out: np.ndarray) -> None:
        """The base's integers, after a check that no expert has changed them."""
        self._sources.read(0, run, start, out)
        other = np.empty_like(out)
        for source, parent in enumerate(self._plan.family.parents, start=1):
            self._sources.read(source, run, start, other)
            if other.any() if parent.is_vector else not np.array_equal(other, out):
                raise ArtifactError(
                    f"{parent.path}: {run.name_at(start)!r} of integers ({run.dtype}) differs from "
                    f"{self._plan.family.base.path}; integers cannot be averaged"
                )


def _record_of(
    plan: Plan,
    method: MethodSettings,
    search: dict[str, Any] | None,
    report: dict[str, Any] | None,
) -> MergedRecord:
    """The record of a planned merge."""
    return merged_record(
        plan.family,
        coefficients=plan.method.found or plan.coefficients.values,
        coefficients_for=plan.coefficients.finer,
        method=method.name,
        settings=method.used,
        has_projections=any(is_projection(spec.name) for spec in plan.layout),
        search=search,
        report=report,
    )
