"""Task vectors tau_i = theta_i - theta: their files, how long they are, how they point.

Norms and cosines are summed in float64 over pieces of the files, so nothing is held whole. A block
projection W_i differs from the identity: its vector is W_i - I. No torch.
N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from deme_cli.artifacts import TaskVectorRecord
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.files import require_output, require_space
from deme_cli.merging.coefficients import block_name
from deme_cli.merging.combine import write_sums
from deme_cli.merging.inputs import (
    PROJECTION,
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
    run: RunFile | None = None, force: bool = False, progress: Progress = silent,
) -> TaskVectors:  # fmt: skip
    """Write each expert's task vector, tv_{i}of{N}.safetensors; measure norms and cosines.

    base: None for that of `run`, or the one beside the experts.   output: the folder; None for
    beside each expert.

    Raises MissingError, ArtifactError (experts of another base), ConfigError (an output exists).
    """
    opened = open_experts(experts, "expert")
    inputs = open_inputs(find_base(opened, run or RunFile(), base), opened)
    paths = [
        (output or expert.path.parent) / f"tv_{expert.record.label}.safetensors"
        for expert in opened
    ]
    num_bytes = sum(spec.num_bytes for spec in inputs.base.tensors.values())
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ConfigError(f"two experts would both be written to {path}; choose other folders")
        require_output(path, force=force)
        require_space(path, num_bytes * sum(path.parent == other.parent for other in paths))

    def told(label: str, total: int, unit: str) -> Callable[[int], None]:
        return lambda done: progress(Step(done, total, label, unit))

    size = inputs.base.num_parameters
    norms, cosines = measure(inputs, told("measuring", size, "parameter"))
    for index, path in enumerate(paths):
        write_task_vector(inputs, index, norms[index], path, told(path.name, num_bytes, "byte"))
    return TaskVectors(paths, inputs, norms, cosines)


def block_of(name: str) -> str:
    """The top-level block of a parameter: down_blocks.0, mid_block, transformer_blocks.3, ...

    Channel projections are one block of their own, and what lies outside of all is `other`.
    """
    if is_projection(name):
        return PROJECTION.rstrip(".")
    return block_name(name) or "other"


def measure(
    inputs: Inputs, advance: Callable[[int], None] = lambda done: None
) -> tuple[Norms, Cosines]:
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
    inputs: Inputs, index: int, norms: dict[str, float], output: Path,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> TaskVectorRecord:  # fmt: skip
    """Write tau of the expert number `index` into `output`, in the dtypes of the base.

    Integers must be those of the base; their difference is zero. Raises ArtifactError if not.
    """
    expert = inputs.experts[index]
    alone = Inputs(inputs.base, inputs.base_record, (expert,))
    fields = asdict(expert.record)
    fields.pop("created_by")
    record = TaskVectorRecord(**fields, expert=expert.record.fingerprint, norms=norms)
    difference = {spec.name: ((1, 1.0), (0, -1.0)) for spec in alone.specs}
    layout = in_file_order(alone.specs)
    return write_sums(
        alone, difference, layout, record, output, is_difference=True, advance=advance
    )
