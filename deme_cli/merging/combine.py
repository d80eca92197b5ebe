"""theta_merged = theta + sum_i w_i tau_i (Eq. 8), streamed from files to a file in bounded memory.

What varies between methods is the list of terms of each tensor, and what becomes of the tau_i
before (methods/); the rest is one engine, which subtracts as well. Sums are carried in float32
(float64 tensors in float64) and rounded once to the base's dtype; integers are never averaged.
Block projections count as identity matrices in the base. No torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deme_cli.artifacts import ArtifactWriter, MergedRecord, Record
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.files import DTYPE_BYTES, TensorSpec
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.inputs import (
    COMPUTED_IN,
    INTEGERS,
    Inputs,
    is_projection,
    open_experts,
    open_inputs,
)
from deme_cli.merging.methods import LINEAR, MethodSettings, fit_coefficients, open_method
from deme_cli.merging.methods.linear import BASE, Method
from deme_cli.merging.tensor_stream import (
    BLOCK,
    PIECE,
    Run,
    TensorStream,
    Terms,
    Transform,
    in_file_order,
    plan_runs,
    to_bytes,
    to_numbers,
)

Advance = Callable[[int], None]
AnyRecord = TypeVar("AnyRecord", bound=Record)
_BLOCKS = 3  # buffers that go round: one is filled while others are written


def merge_artifacts(
    base: Path, experts: Sequence[Path], coefficients: Sequence[float], output: Path
) -> MergedRecord:
    """Merge experts or task vectors with their base into `output` (Eq. 8).

    Raises ArtifactError, ConfigError or NumericsError; then no output appears.
    """
    inputs = open_inputs(base, open_experts(experts, "expert", "task-vector"))
    return merge_inputs(inputs, coefficients, output)


def merge_inputs(
    inputs: Inputs, coefficients: Coefficients | Sequence[float] | None, output: Path, *,
    method: MethodSettings = LINEAR, search: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None, advance: Advance = lambda num_bytes: None,
) -> MergedRecord:  # fmt: skip
    """The same for checked headers, by any method, with coefficients that may differ by tensor.

    coefficients: None for 1/N each, and for a method that finds its own.   `search` and `report` go
    into the record; `advance` is told the number of bytes written so far.
    """
    merge = plan_merge(inputs, coefficients, method)
    record = merge.record(method, search=search, report=report)
    return write_sums(
        inputs, merge.terms, merge.layout, record, output,
        transform=merge.method.transform, advance=advance,
    )  # fmt: skip


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
                {"path": str(expert.path), "kind": expert.record.kind,
                 "fingerprint": expert.record.fingerprint, "range": expert.record.range}
                for expert in experts
            ],
            coefficients=list(values),
            coefficients_for={glob: list(ws) for glob, ws in self.coefficients.finer.items()},
            method=method.name,
            settings=method.used,
            projection=placements.pop() if len(placements) == 1 else "mixed",
            search=search,
            report=report,
        )  # fmt: skip


def plan_merge(
    inputs: Inputs,
    coefficients: Coefficients | Sequence[float] | None,
    method: MethodSettings = LINEAR,
) -> PlannedMerge:
    """Everything that is known before the first byte is written.

    Raises ConfigError where the coefficients do not fit.
    """
    given = fit_coefficients(inputs, coefficients, method)
    opened = open_method(inputs, method)
    terms = {spec.name: opened.terms(spec.name, given.of(spec.name)) for spec in inputs.specs}
    moved = any(terms[spec.name] != BASE for spec in inputs.projections)
    layout = [*inputs.base.tensors.values(), *(inputs.projections if moved else [])]
    return PlannedMerge(inputs, given, opened, terms, in_file_order(layout))


def write_sums(
    inputs: Inputs, terms: Mapping[str, Terms], layout: Sequence[TensorSpec], record: AnyRecord,
    output: Path, *, transform: Transform | None = None, is_difference: bool = False,
    advance: Advance = lambda num_bytes: None,
) -> AnyRecord:  # fmt: skip
    """Write sum_k c_k y_k of every tensor of `layout` under `record`; returns it with the
    fingerprint they have.

    is_difference: the integers, which must be the same in all files, are written as zeros.   Blocks
    are written by a thread of their own while the next one is computed.
    """
    runs = plan_runs(
        layout, inputs.headers, lambda spec: spec.name if transform else terms[spec.name]
    )
    blocks = [np.empty(BLOCK * max(DTYPE_BYTES.values()), np.uint8) for _ in range(_BLOCKS)]
    under_way, number, written = deque[Future[None]](), 0, 0
    with (
        TensorStream(inputs, transform) as stream,
        ArtifactWriter(output, layout, record) as writer,
        ThreadPoolExecutor(1, "deme-write") as pool,
        np.errstate(over="ignore", invalid="ignore"),  # looked for in the result
    ):
        for run in runs:
            for start, stop in run.spans(BLOCK):
                if len(under_way) == _BLOCKS:
                    under_way.popleft().result()  # its block is free again
                block = blocks[number % _BLOCKS][: (stop - start) * DTYPE_BYTES[run.dtype]]
                if run.dtype in INTEGERS:
                    _copy_equal(stream, inputs, run, start, block)
                    block *= not is_difference
                else:
                    _fill(stream, terms[run.specs[0].name], run, start, block)
                    _require_finite(run, start, block, output)
                under_way.append(pool.submit(writer.write, block))
                number, written = number + 1, written + block.size
                advance(written)
        for future in under_way:
            future.result()
    return writer.record


def _fill(stream: TensorStream, terms: Terms, run: Run, start: int, out: np.ndarray) -> None:
    """Put sum_k c_k y_k of the elements of `run` from `start` on into the bytes `out`."""
    if len(terms) == 1 and terms[0][1] == 1 and (stream.transform is None or terms == BASE):
        stream.read(terms[0][0], run, start, out)  # bit for bit
        return
    size = PIECE * DTYPE_BYTES[run.dtype]
    for offset in range(0, out.size, size):
        piece = out[offset : offset + size]
        is_wide = run.dtype in ("F32", "F64")
        total = piece.view(COMPUTED_IN[run.dtype]) if is_wide else stream.total[: piece.size // 2]
        stream.add_up(run, start, terms, total)
        if not is_wide:
            to_bytes(total, run.dtype, piece)
        start += PIECE


def _require_finite(run: Run, start: int, out: np.ndarray, output: Path) -> None:
    """Raises NumericsError naming the first tensor with a number in `out` that is not."""
    size, scratch = PIECE * DTYPE_BYTES[run.dtype], np.empty(PIECE, np.float32)
    for offset in range(0, out.size, size):
        finite = np.isfinite(to_numbers(out[offset : offset + size], run.dtype, scratch))
        if not finite.all():
            name = run.name_at(start + int(finite.argmin()))
            raise NumericsError(
                f"{output}: {name!r} would not be finite in {run.dtype}; "
                f"look for NaN in the experts, or take smaller coefficients"
            )
        start += PIECE


def _copy_equal(
    stream: TensorStream, inputs: Inputs, run: Run, start: int, out: np.ndarray
) -> None:
    """The base's integers, after a check that no expert has changed them."""
    stream.read(0, run, start, out)
    other = np.empty_like(out)
    for source, expert in enumerate(inputs.experts, start=1):
        stream.read(source, run, start, other)
        if other.any() if expert.is_vector else not np.array_equal(other, out):
            raise ArtifactError(
                f"{expert.path}: {run.name_at(start)!r} of integers ({run.dtype}) differs from "
                f"{inputs.base.path}; integers have no average and no difference"
            )
