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
from deme_cli.merging.inputs import Inputs, is_projection, open_experts, open_inputs
from deme_cli.merging.methods import LINEAR, MethodSettings, fit_coefficients, open_method
from deme_cli.merging.methods.linear import BASE, Method
from deme_cli.merging.tensor_stream import (
    BLOCK,
    COMPUTED_IN,
    INTEGERS,
    PIECE,
    Run,
    TensorStream,
    Terms,
    WriteBehind,
    in_file_order,
    plan_runs,
    to_bytes,
    to_numbers,
)

Advance = Callable[[int], None]


def merge_artifacts(
    base: Path, experts: Sequence[Path], coefficients: Sequence[float], output: Path
) -> MergedRecord:
    """Merge experts or task vectors with their base into `output` (Eq. 8).

    Raises ArtifactError, ConfigError or NumericsError; then no output appears.
    """
    inputs = open_inputs(base, open_experts(experts, "expert", "task-vector"))
    return merge_inputs(inputs, coefficients, output)


def merge_inputs(
    inputs: Inputs,
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
    merge = plan_merge(inputs, coefficients, method)
    record = merge.record(method, search=search, report=report)
    return write_merge(merge, record, output, advance)


@dataclass(frozen=True)
class PlannedMerge:
    """A merge that is ready to be written: the terms of each tensor, and the order of the file."""

    inputs: Inputs
    coefficients: Coefficients
    method: Method
    terms: dict[str, Terms]
    layout: list[TensorSpec]

    def record(
        self, method: MethodSettings, *, search: dict[str, Any] | None,
        report: dict[str, Any] | None,
    ) -> MergedRecord:  # fmt: skip
        """Where the merged file comes from; `parents` in the order of `coefficients`."""
        base, experts = self.inputs.base_record, self.inputs.experts
        placements = {expert.record.projection for expert in experts}
        if not any(is_projection(spec.name) for spec in self.layout) and "block" in placements:
            placements = {"none"}  # nothing has moved them: the base has none
        values = self.method.own_coefficients or self.coefficients.values
        return MergedRecord(
            source=base.source,
            model_config=base.model_config,
            scheduler_config=base.scheduler_config,
            num_train_timesteps=base.num_train_timesteps,
            companions=base.companions or experts[0].record.companions,
            base=base.fingerprint,
            parents=[
                {
                    "path": str(expert.path),
                    "kind": expert.record.kind,
                    "fingerprint": expert.record.fingerprint,
                    "range": expert.record.range,
                }
                for expert in experts
            ],
            coefficients=[float(w) for w in values],
            coefficients_for={
                glob: [float(w) for w in ws] for glob, ws in self.coefficients.finer.items()
            },
            method=method.name,
            settings=method.used,
            projection=placements.pop() if len(placements) == 1 else "mixed",
            search=search,
            report=report,
        )


def plan_merge(
    inputs: Inputs,
    coefficients: Coefficients | Sequence[float] | None,
    method: MethodSettings = LINEAR,
) -> PlannedMerge:
    """Everything that is known before the first byte is written.

    Raises ConfigError where the coefficients do not fit, ArtifactError naming a tensor whose dtype
    has no arithmetic here.
    """
    given = fit_coefficients(inputs, coefficients, method)
    for spec in inputs.specs:
        is_copied = spec.dtype in INTEGERS and not is_projection(spec.name)
        if spec.dtype not in COMPUTED_IN and not is_copied:
            raise ArtifactError(
                f"{inputs.base.path}: {spec.name!r} of {spec.dtype} cannot be merged"
            )
    opened = open_method(inputs, method)
    terms = {spec.name: opened.terms(spec.name, given.of(spec.name)) for spec in inputs.specs}
    moved = any(terms[spec.name] != BASE for spec in inputs.projections)
    layout = [*inputs.base.tensors.values(), *(inputs.projections if moved else [])]
    return PlannedMerge(inputs, given, opened, terms, in_file_order(layout))


def write_merge(
    merge: PlannedMerge,
    record: MergedRecord,
    output: Path,
    advance: Advance = lambda num_bytes: None,
) -> MergedRecord:
    """Write the merged tensors under `record`; returns it with the fingerprint they have."""
    written, by_tensor = 0, merge.method.transform is not None
    runs = plan_runs(
        merge.layout, merge.inputs.headers,
        lambda spec: spec.name if by_tensor else merge.terms[spec.name],
    )  # fmt: skip
    with (
        TensorStream(merge.inputs, merge.method.transform) as stream,
        ArtifactWriter(output, merge.layout, record) as writer,
        WriteBehind(writer.write, BLOCK * max(DTYPE_BYTES.values())) as behind,
        np.errstate(over="ignore", invalid="ignore"),  # looked for in the result
    ):
        engine = _Engine(stream, merge, output)
        for run in runs:
            for start, stop in run.spans(BLOCK):
                block = behind.block()
                num_bytes = (stop - start) * DTYPE_BYTES[run.dtype]
                engine.fill(run, start, block[:num_bytes])
                behind.put(block, num_bytes)
                written += num_bytes
                advance(written)
    assert isinstance(writer.record, MergedRecord)
    return writer.record


class _Engine:
    """The bytes of merged runs."""

    def __init__(self, stream: TensorStream, merge: PlannedMerge, output: Path) -> None:
        self._stream, self._merge, self._output = stream, merge, output
        self._numbers = np.empty(PIECE, np.float32)
        self._total = np.empty(PIECE, np.float32)

    def fill(self, run: Run, start: int, out: np.ndarray) -> None:
        """Put the merged elements of `run` from `start` on into the bytes `out`."""
        terms = self._merge.terms[run.specs[0].name]
        is_file = terms == BASE or (self._merge.method.transform is None and len(terms) == 1)
        if run.dtype in INTEGERS:
            self._copy_equal(run, start, out)
        elif is_file and terms[0][1] == 1:
            self._stream.read(terms[0][0], run, start, out)
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
        self._stream.add_up(run, start, terms, total)
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
        self._stream.read(0, run, start, out)
        other = np.empty_like(out)
        for source, expert in enumerate(self._merge.inputs.experts, start=1):
            self._stream.read(source, run, start, other)
            if other.any() if expert.is_vector else not np.array_equal(other, out):
                raise ArtifactError(
                    f"{expert.path}: {run.name_at(start)!r} of integers ({run.dtype}) differs from "
                    f"{self._merge.inputs.base.path}; integers cannot be averaged"
                )
