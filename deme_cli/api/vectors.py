"""`task_vector`: what each expert's training changed, tau_i = theta_i - theta, as artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.errors import ConfigError
from deme_cli.files import require_output, require_space
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.merging.lineage import Family
    from deme_cli.merging.task_vectors import Measurements


@dataclass(frozen=True)
class TaskVectors:
    """The files, in the order of the experts, and how long and how alike the vectors are.

    measured.norms: by expert, of the whole vector and of its parts.   measured.cosines: (N, N),
    None where one of the two is zero.
    """

    paths: list[Path]
    family: Family
    measured: Measurements


def task_vector(
    experts: Sequence[Path],
    *,
    base: Path | None = None,
    output: Path | None = None,
    run: RunFile | None = None,
    force: bool = False,
) -> TaskVectors:
    """Write each expert's task vector, tv_{i}of{N}.safetensors; measure norms and cosines.

    base: None for that of `run`, or the one beside the experts.   output: the folder; None for
    beside each expert.

    Raises MissingError, ArtifactError (experts of another base), ConfigError (an output exists).
    """
    from deme_cli.merging.lineage import find_base, open_family, open_parents
    from deme_cli.merging.task_vectors import measure, write_task_vector

    parents = open_parents(experts, "expert")
    family = open_family(find_base(parents, run or RunFile(), base), parents)
    paths = [
        (output or parent.path.parent) / f"tv_{parent.record.label}.safetensors"
        for parent in parents
    ]
    _check_outputs(paths, sum(spec.num_bytes for spec in family.base.tensors.values()), force)
    size = family.base.num_parameters
    with console.progress("measuring", size, "parameter") as bar:
        measured = measure(family, bar.advance)
    for index, path in enumerate(paths):
        with console.progress(path.name, size, "parameter") as bar:
            write_task_vector(family, index, measured.norms[index], path, bar.advance)
    return TaskVectors(paths, family, measured)


def _check_outputs(paths: Sequence[Path], num_bytes: int, force: bool) -> None:
    """Check that the vectors have names of their own, places to go, and room there."""
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ConfigError(f"two experts would both be written to {path}; choose other folders")
        require_output(path, force=force)
        require_space(path, num_bytes * sum(path.parent == other.parent for other in paths))
