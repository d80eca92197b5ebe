"""`task-vector`: each expert's tau_i = theta_i - theta as a file; how long they are, how alike.

Norms and cosines are summed in float64 over pieces of the files. No torch.
N experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from deme_cli.artifacts import TaskVectorRecord
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.files import DTYPE_BYTES, TensorSpec, cast_specs, require_output, require_space
from deme_cli.merging.coefficients import block_name
from deme_cli.merging.combine import Advance, write_sums
from deme_cli.merging.inputs import (
    PROJECTION,
    Expert,
    Inputs,
    find_base,
    is_projection,
    open_experts,
    open_inputs,
)
from deme_cli.merging.tensor_stream import in_file_order, inner_products
from deme_cli.run_file import RunFile

Norms = list[dict[str, float]]
Cosines = list[list[float | None]]


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
        require_output(path, force=force, inputs=[*experts, inputs.base.path])
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
    theirs = dict(expert.header.tensors)
    if expert.holds_adapters:
        theirs = {spec.name: spec for spec in cast_specs(inputs.specs, "fp32")}
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
    fields = {**fields, "holds": "all", "adapter": None}
    fields.pop("created_by")
    record = TaskVectorRecord(**fields, expert=expert.record.fingerprint, norms=norms)
    terms = ((1, 1.0),) if expert.is_vector else ((1, 1.0), (0, -1.0))
    difference = {spec.name: terms for spec in alone.specs}
    layout = layout or _difference_layout(inputs, expert)
    return write_sums(
        alone, difference, layout, record, output, is_difference=True, advance=advance
    )
