"""Task vectors tau_i = theta_i - theta, and theta + sum_i w_i tau_i (Eq. 8), from files to a file.

What varies between methods is the list of terms of each tensor, and what becomes of the tau_i
before (methods/); the rest is one engine, which subtracts as well. Sums are carried in float32
(float64 tensors in float64) and rounded once to the base's dtype; integers are never averaged.
Block projections count as identity matrices in the base: the vector of W_i is W_i - I. Norms and
cosines are summed in float64 over pieces of the files. Nothing is held whole. No torch.
N experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deme_cli.artifacts import ArtifactWriter, MergedRecord, Record, TaskVectorRecord
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.files import (
    DTYPE_BYTES,
    Header,
    TensorSpec,
    cast_specs,
    require_output,
    require_space,
)
from deme_cli.merging.coefficients import Coefficients, block_name
from deme_cli.merging.inputs import (
    COMPUTED_IN,
    INTEGERS,
    PROJECTION,
    Expert,
    Inputs,
    find_base,
    is_projection,
    open_experts,
    open_inputs,
)
from deme_cli.merging.methods import LINEAR, MethodSettings, fit_coefficients, open_method
from deme_cli.merging.methods.linear import BASE
from deme_cli.merging.tensor_stream import (
    BLOCK,
    PIECE,
    Run,
    TensorStream,
    Terms,
    Transform,
    in_file_order,
    inner_products,
    plan_runs,
    to_bytes,
    to_numbers,
)
from deme_cli.run_file import RunFile

Advance = Callable[[int], None]
Norms = list[dict[str, float]]
Cosines = list[list[float | None]]
AnyRecord = TypeVar("AnyRecord", bound=Record)
_BLOCKS = 3  # buffers that go round: one is filled while others are written


def merge_inputs(
    inputs: Inputs, coefficients: Coefficients | Sequence[float] | None, output: Path, *,
    method: MethodSettings = LINEAR, search: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None, like: Header | None = None, save_dtype: str | None = None,
    advance: Advance = lambda done: None,
) -> MergedRecord:  # fmt: skip
    """Merge experts or task vectors with their base into `output` (Eq. 8), by any method.

    coefficients: None for 1/N each, and for a method that finds its own.   `search` and `report` go
    into the record.   like: a merged file whose order and dtypes of tensors are taken.
    save_dtype: of floating-point tensors, None for those of the base.   `advance` is told the
    number of bytes written so far.

    Raises ArtifactError, ConfigError or NumericsError; then no output appears.
    """
    given = fit_coefficients(inputs, coefficients, method)
    opened = open_method(inputs, method)
    terms = {spec.name: opened.terms(spec.name, given.of(spec.name)) for spec in inputs.specs}
    moves = any(terms[spec.name] != BASE for spec in inputs.projections)
    specs = inputs.specs if moves else inputs.base.tensors.values()
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
    )  # fmt: skip
    return write_sums(
        inputs, terms, layout, record, output, transform=opened.transform, advance=advance
    )


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
    source, c = terms[0] if len(terms) == 1 else (0, 0.0)
    is_copy = c == 1 and (stream.transform is None or terms == BASE)
    if is_copy and run.dtypes[source] == run.dtype:
        stream.read(source, run, start, out)  # bit for bit
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


@dataclass(frozen=True)
class TaskVectors:
    """The files, in the order of the experts; how long the vectors are, and how alike.

    norms: per expert L2 norms `total`, `relative` (to the base) and one per top-level block.
    cosines: (N, N); None where a task vector is zero.
    """

    paths: list[Path]
    inputs: Inputs
    norms: Norms
    cosines: Cosines


def task_vector(
    experts: Sequence[Path], *, base: Path | None = None, output: Path | None = None,
    run: RunFile | None = None, save_dtype: str | None = None, force: bool = False,
    progress: Progress = silent,
) -> TaskVectors:  # fmt: skip
    """Write each expert's task vector, tv_{i}of{N}.safetensors; measure norms and cosines.

    base: None for that of `run`, or the one beside the experts.   output: the folder; None for
    beside each expert.   save_dtype: of floating-point tensors; None for that of expert or base,
    the wider one.

    Raises MissingError, ArtifactError (experts of another base), ConfigError (an output exists).
    """
    opened = open_experts(experts, "expert")
    inputs = open_inputs(find_base(opened, run or RunFile(), base), opened)
    paths = [
        (output or expert.path.parent) / f"tv_{expert.record.label}.safetensors"
        for expert in opened
    ]
    layouts = [_difference_layout(inputs, expert, save_dtype) for expert in opened]
    sizes = [sum(spec.num_bytes for spec in layout) for layout in layouts]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ConfigError(f"two experts would both be written to {path}; choose other folders")
        require_output(path, force=force)
        beside = (n for n, one in zip(sizes, paths, strict=True) if one.parent == path.parent)
        require_space(path, sum(beside))

    def told(label: str, total: int, unit: str) -> Advance:
        return lambda done: progress(Step(done, total, label, unit))

    size = inputs.base.num_parameters
    norms, cosines = measure(inputs, told("measuring", size, "parameter"))
    for index, path in enumerate(paths):
        advance = told(path.name, sizes[index], "byte")
        write_task_vector(inputs, index, norms[index], path, layout=layouts[index], advance=advance)
    return TaskVectors(paths, inputs, norms, cosines)


def _difference_layout(
    inputs: Inputs, expert: Expert, save_dtype: str | None = None
) -> list[TensorSpec]:
    """The tensors of a task vector: in `save_dtype`, else in the wider of the two dtypes."""
    theirs = expert.header.tensors
    wider = (
        max(spec, theirs[spec.name], key=lambda one: DTYPE_BYTES[one.dtype])
        for spec in inputs.specs
    )
    return in_file_order(cast_specs(wider, save_dtype))


def block_of(name: str) -> str:
    """The top-level block of a parameter: down_blocks.0, mid_block, transformer_blocks.3, ...

    Channel projections are one block of their own, and what lies outside of all is `other`.
    """
    if is_projection(name):
        return PROJECTION.rstrip(".")
    return block_name(name) or "other"


def measure(inputs: Inputs, advance: Advance = lambda done: None) -> tuple[Norms, Cosines]:
    """Norms and pairwise cosines of the experts' task vectors, in one pass over the files.

    Raises NumericsError naming a file and a tensor of it that is not finite, or a base of zeros.
    """
    by_block: dict[str, np.ndarray] = {}  # sums of (N + 1, N + 1) inner products
    base_square = 0.0
    for name, gram in inner_products(inputs, advance).items():
        by_block[block_of(name)] = by_block.get(block_of(name), 0) + gram
        base_square += 0.0 if is_projection(name) else gram[0, 0]  # a projection's base is I
    if base_square == 0:
        raise NumericsError(f"{inputs.base.path}: its weights are all zero")
    dots = sum(by_block.values())[1:, 1:]  # type: ignore[index]  # a base has tensors
    lengths = np.sqrt(np.diag(dots))
    norms = [
        {"total": float(total), "relative": float(total / np.sqrt(base_square)),
         **{name: float(np.sqrt(by_block[name][i, i])) for name in sorted(by_block)}}
        for i, total in enumerate(lengths, start=1)
    ]  # fmt: skip
    sizes = np.outer(lengths, lengths)
    cosines: Cosines = [
        [float(np.clip(dot / size, -1, 1)) if size else None
         for dot, size in zip(*rows, strict=True)]
        for rows in zip(dots, sizes, strict=True)
    ]  # fmt: skip
    return norms, cosines


def write_task_vector(
    inputs: Inputs, index: int, norms: dict[str, float], output: Path, *,
    layout: list[TensorSpec] | None = None, advance: Advance = lambda done: None,
) -> TaskVectorRecord:  # fmt: skip
    """Write tau of the expert number `index` into `output`, with the tensors of `layout`.

    layout: None for the wider dtype of base and expert, tensor by tensor.   Integers must be those
    of the base; their difference is zero. Raises ArtifactError if not.
    """
    expert = inputs.experts[index]
    alone = Inputs(inputs.base, inputs.base_record, (expert,))
    fields = asdict(expert.record)
    fields.pop("created_by")
    record = TaskVectorRecord(**fields, expert=expert.record.fingerprint, norms=norms)
    difference = {spec.name: ((1, 1.0), (0, -1.0)) for spec in alone.specs}
    layout = layout or _difference_layout(inputs, expert)
    return write_sums(
        alone, difference, layout, record, output, is_difference=True, advance=advance
    )
