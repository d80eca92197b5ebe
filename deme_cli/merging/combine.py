"""theta + sum_i w_i tau_i with tau_i = theta_i - theta (Eq. 8), from files to a file.

What varies between methods is the list of terms of each tensor, and what becomes of the tau_i
before (methods/); the rest is one engine, which subtracts as well. Sums are carried in float32
(float64 tensors in float64) and rounded once to the dtype that is stored; integers are never
averaged. Block projections count as identity matrices in the base: the vector of W_i is W_i - I.
Nothing is held whole. No torch.
N experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deme_cli.artifacts import ArtifactWriter, MergedRecord, Record
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.files import DTYPE_BYTES, Header, TensorSpec, cast_specs
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.factors import merged_factors
from deme_cli.merging.inputs import COMPUTED_IN, INTEGERS, Inputs
from deme_cli.merging.methods import LINEAR, METHODS, MethodSettings, fit_coefficients
from deme_cli.merging.methods.linear import BASE
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


def merge_inputs(
    inputs: Inputs, coefficients: Coefficients | Sequence[float] | None, output: Path, *,
    method: MethodSettings = LINEAR, search: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None, like: Header | None = None, save_dtype: str | None = None,
    lora: int | None = None, advance: Advance = lambda done: None,
) -> MergedRecord:  # fmt: skip
    """Merge experts or task vectors with their base into `output` (Eq. 8), by any method.

    coefficients: None for 1/N each, and for a method that finds its own.   `search` and `report` go
    into the record.   like: a merged file whose order and dtypes of tensors are taken.
    save_dtype: of floating-point tensors, None for those of the base.   lora: write the sum of
    adapters as one LoRA of this rank at most, in float32 without a `save_dtype`.   `advance` is
    told the number of bytes written so far.

    Raises ArtifactError, ConfigError or NumericsError; then no output appears.
    """
    given = fit_coefficients(inputs, coefficients, method)
    opened = METHODS[method.name](inputs, method)
    terms = {spec.name: opened.terms(spec.name, given.of(spec.name)) for spec in inputs.specs}
    moves = any(terms[spec.name] != BASE for spec in inputs.projections)
    specs, adapter = inputs.specs if moves else inputs.base.tensors.values(), None
    if lora:
        factors, kept = merged_factors(inputs, terms, lora)
        specs = [TensorSpec(name, "F32", side.shape) for name, side in factors.items()]
        adapter = {"rank": lora, "kept": kept}
    layout = in_file_order(cast_specs(specs, save_dtype))
    if like is not None:
        if like.tensors.keys() != {spec.name for spec in layout}:
            raise ArtifactError(f"{like.path}: does not have the tensors of its base and parents")
        layout = sorted(like.tensors.values(), key=lambda spec: spec.begin)
    base, experts = inputs.base_record, inputs.experts
    placements = {expert.record.projection for expert in experts}
    if not moves and "block" in placements:
        placements = {"none"}  # nothing has moved them: the base has none
    record = MergedRecord(
        source=base.source,
        model_config=base.model_config,
        scheduler_config=base.scheduler_config,
        num_train_timesteps=base.num_train_timesteps,
        companions=base.companions or experts[0].record.companions,
        single_file=base.single_file,
        base=base.fingerprint,
        parents=[
            {"path": str(expert.path), "kind": expert.record.kind,
             "fingerprint": expert.record.fingerprint, "range": expert.record.range}
            for expert in experts
        ],
        coefficients=list(opened.own_coefficients or given.values),
        coefficients_for={glob: list(ws) for glob, ws in given.finer.items()},
        method=method.name,
        settings=method.used,
        projection=placements.pop() if len(placements) == 1 else "mixed",
        search=search,
        report=report,
        holds="adapter" if lora else "all",
        adapter=adapter,
    )  # fmt: skip
    if lora:
        return _write_factors(factors, layout, record, output, advance)
    return write_sums(
        inputs, terms, layout, record, output, transform=opened.transform, advance=advance
    )


def _write_factors(
    factors: Mapping[str, np.ndarray], layout: Sequence[TensorSpec], record: AnyRecord,
    output: Path, advance: Advance,
) -> AnyRecord:  # fmt: skip
    """Write factors, all in memory, under `record`; returns it with the fingerprint they have."""
    written = 0
    with ArtifactWriter(output, layout, record) as writer:
        for spec in layout:
            block = np.empty(spec.num_bytes, np.uint8)
            with np.errstate(over="ignore"):  # looked for in the result
                to_bytes(factors[spec.name].astype(np.float32).ravel(), spec.dtype, block)
            scratch = np.empty(spec.num_elements, np.float32)
            if not np.isfinite(to_numbers(block, spec.dtype, scratch)).all():
                raise NumericsError(f"{output}: {spec.name!r} would not be finite in {spec.dtype}")
            writer.write(block)
            advance(written := written + block.size)
    return writer.record


def write_sums(
    inputs: Inputs, terms: Mapping[str, Terms], layout: Sequence[TensorSpec], record: AnyRecord,
    output: Path, *, transform: Transform | None = None, is_difference: bool = False,
    advance: Advance = lambda done: None,
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
        for run, (start, stop) in [(one, span) for one in runs for span in one.spans(BLOCK)]:
            if len(under_way) == _BLOCKS:
                under_way.popleft().result()  # its block is free again
            block = blocks[number % _BLOCKS][: (stop - start) * DTYPE_BYTES[run.dtype]]
            if run.dtype in INTEGERS:
                _copy_equal(stream, inputs, run, start, block)
                block *= not is_difference
            else:
                place = _fill(stream, terms[run.specs[0].name], run, start, block)
                if place is not None:
                    raise NumericsError(
                        f"{output}: {run.name_at(place)!r} would not be finite in {run.dtype}; "
                        f"look for NaN in the experts, or take smaller coefficients"
                    )
            under_way.append(pool.submit(writer.write, block))
            number, written = number + 1, written + block.size
            advance(written)
        for future in under_way:
            future.result()
    return writer.record


def _fill(stream: TensorStream, terms: Terms, run: Run, start: int, out: np.ndarray) -> int | None:
    """Put sum_k c_k y_k of the elements of `run` from `start` on into the bytes `out`; gives the
    first that is not finite, if there is one."""
    source, c = terms[0] if len(terms) == 1 else (0, 0.0)
    is_copy = c == 1 and (stream.transform is None or terms == BASE)
    is_wide, size = run.dtype in ("F32", "F64"), PIECE * DTYPE_BYTES[run.dtype]
    scratch, sums = np.empty((2, PIECE), np.float32)
    for offset in range(0, out.size, size):
        piece = out[offset : offset + size]
        if is_copy and run.dtypes[source] == run.dtype:
            stream.read(source, run, start, piece)  # bit for bit
        else:
            total = piece.view(COMPUTED_IN[run.dtype]) if is_wide else sums[: piece.size // 2]
            stream.add_up(run, start, terms, total)
            if not is_wide:
                to_bytes(total, run.dtype, piece)
        finite = np.isfinite(to_numbers(piece, run.dtype, scratch))
        if not finite.all():
            return start + int(finite.argmin())
        start += PIECE
    return None


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
