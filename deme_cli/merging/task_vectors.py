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

from deme_cli.artifacts import ArtifactWriter, TaskVectorRecord
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.files import DTYPE_BYTES, TensorSpec, require_output, require_space
from deme_cli.merging.coefficients import block_name
from deme_cli.merging.inputs import (
    PROJECTION,
    Expert,
    Inputs,
    find_base,
    is_projection,
    open_experts,
    open_inputs,
)
from deme_cli.merging.tensor_stream import (
    COMPUTED_IN,
    INTEGERS,
    PIECE,
    Run,
    TensorStream,
    in_file_order,
    plan_runs,
    to_bytes,
)
from deme_cli.progress import Progress, Step, silent
from deme_cli.run_file import RunFile

_WIDE = np.dtype(np.float64)  # what differences are computed and summed in


@dataclass(frozen=True)
class Measurements:
    """How far each expert moved, and how alike the moves are.

    norms: per expert L2 norms `total`, `relative` (to the base) and one per top-level block.
    cosines: (N, N); None where a task vector is zero.
    """

    norms: list[dict[str, float]]
    cosines: list[list[float | None]]


@dataclass(frozen=True)
class TaskVectors:
    """The files, in the order of the experts, and how long and how alike the vectors are."""

    paths: list[Path]
    inputs: Inputs
    measured: Measurements


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
    size = inputs.base.num_parameters
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

    def told(label: str) -> Callable[[int], None]:
        return lambda done: progress(Step(done, size, label, "parameter"))

    measured = measure(inputs, told("measuring"))
    for index, path in enumerate(paths):
        write_task_vector(inputs, index, measured.norms[index], path, told(path.name))
    return TaskVectors(paths, inputs, measured)


def block_of(name: str) -> str:
    """The top-level block of a parameter: down_blocks.0, mid_block, transformer_blocks.3, ...

    Channel projections are one block of their own, and what lies outside of all is `other`.
    """
    if is_projection(name):
        return PROJECTION.rstrip(".")
    return block_name(name) or "other"


def measure(inputs: Inputs, advance: Callable[[int], None] = lambda n: None) -> Measurements:
    """Norms and pairwise cosines of the experts' task vectors, in one pass over the files.

    advance: told the number of parameters passed so far.
    Raises NumericsError naming an expert whose difference is not finite.
    """
    count = len(inputs.experts)
    base_square, done = 0.0, 0
    grams: dict[str, np.ndarray] = {}  # (N, N) inner products per block
    with TensorStream(inputs) as stream:
        for run in plan_runs(_layout(inputs), inputs.headers, lambda spec: block_of(spec.name)):
            gram = grams.setdefault(block_of(run.specs[0].name), np.zeros((count, count)))
            for start, stop in run.spans(PIECE):
                if run.dtype not in INTEGERS:
                    theta, taus = stream.vectors(run, start, stop, _WIDE)
                    gram += taus @ taus.T
                    if run.begins[0] is not None:
                        base_square += float(theta @ theta)
                done += stop - start
                advance(done)
    return _measurements(inputs, grams, base_square)


def write_task_vector(
    inputs: Inputs,
    index: int,
    norms: dict[str, float],
    output: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> TaskVectorRecord:
    """Write tau of the expert number `index` into `output`, in the dtypes of the base.

    Integers must be those of the base; their difference is zero. Raises ArtifactError if not.
    """
    expert = inputs.experts[index]
    alone = Inputs(inputs.base, inputs.base_record, (expert,))
    layout, done = _layout(alone), 0
    with (
        TensorStream(alone) as stream,
        ArtifactWriter(output, layout, _record(expert, norms)) as writer,
    ):
        for run in plan_runs(layout, alone.headers):
            out = np.empty(PIECE * DTYPE_BYTES[run.dtype], np.uint8)
            for start, stop in run.spans(PIECE):
                piece = out[: (stop - start) * DTYPE_BYTES[run.dtype]]
                if run.dtype in INTEGERS:
                    _zeros_if_equal(stream, alone, run, start, piece)
                else:
                    difference = stream.vectors(run, start, stop, _WIDE)[1][0]
                    to_bytes(difference.astype(COMPUTED_IN[run.dtype]), run.dtype, piece)
                writer.write(piece)
                done += stop - start
                advance(done)
    return writer.record


def _layout(inputs: Inputs) -> list[TensorSpec]:
    """The base's tensors and the experts' projections, in the order of files."""
    for spec in inputs.specs:
        integer = spec.dtype in INTEGERS and not is_projection(spec.name)
        if spec.dtype not in COMPUTED_IN and not integer:
            raise ArtifactError(
                f"{inputs.base.path}: {spec.name!r} of {spec.dtype} cannot be subtracted"
            )
    return in_file_order(inputs.specs)


def _zeros_if_equal(
    stream: TensorStream, inputs: Inputs, run: Run, start: int, out: np.ndarray
) -> None:
    """Fill `out` with zeros, after a check that the expert's integers are the base's."""
    theirs = np.empty_like(out)
    stream.read(0, run, start, out)
    stream.read(1, run, start, theirs)
    if not np.array_equal(out, theirs):
        raise ArtifactError(
            f"{inputs.experts[0].path}: {run.name_at(start)!r} of integers ({run.dtype}) differs "
            f"from {inputs.base.path}; integers have no task vector"
        )
    out[:] = 0


def _measurements(inputs: Inputs, grams: dict[str, np.ndarray], base_square: float) -> Measurements:
    """Norms and cosines from the inner products of each block and the base's squared norm."""
    if not 0 < base_square < np.inf:
        raise NumericsError(f"{inputs.base.path}: its weights are all zero or not finite")
    gram = sum(grams.values(), np.zeros((len(inputs.experts),) * 2))
    for index, expert in enumerate(inputs.experts):
        if not np.isfinite(gram[index, index]):
            raise NumericsError(f"{expert.path}: holds weights that are not finite")
    totals = np.sqrt(np.diag(gram))
    norms = []
    for index, total in enumerate(totals):
        blocks = {name: float(np.sqrt(grams[name][index, index])) for name in sorted(grams)}
        relative = float(total / np.sqrt(base_square))
        norms.append({"total": float(total), "relative": relative, **blocks})
    cosines: list[list[float | None]] = [
        [float(np.clip(dot / (a * b), -1, 1)) if a * b else None
         for dot, b in zip(row, totals, strict=True)]
        for row, a in zip(gram, totals, strict=True)
    ]  # fmt: skip
    return Measurements(norms, cosines)


def _record(expert: Expert, norms: dict[str, float]) -> TaskVectorRecord:
    """The expert's record with `expert` and `norms`."""
    fields = asdict(expert.record)
    fields.pop("created_by")
    fingerprint = fields.pop("fingerprint")
    return TaskVectorRecord(**fields, expert=fingerprint, norms=norms)
