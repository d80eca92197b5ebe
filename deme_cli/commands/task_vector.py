"""`deme task-vector`: the difference each expert made, how long it is, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.commands.options import ConfigPath, Force, Json, Quiet, begin
from deme_cli.errors import ConfigError
from deme_cli.outputs import require_output, require_space

if TYPE_CHECKING:
    from deme_cli.merging.lineage import Family
    from deme_cli.merging.task_vectors import Measurements

Experts = Annotated[
    list[Path],
    typer.Argument(metavar="EXPERT", help="Experts of one base.", show_default=False),
]
Base = Annotated[
    Path | None,
    typer.Option(
        "--base",
        help=r"The base they were finetuned from \[default: that of deme.toml, or beside them].",
        show_default=False,
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help=r"Folder for the vectors \[default: beside each expert].",
        show_default=False,
    ),
]


def task_vector(
    experts: Experts,
    base: Base = None,
    output: Folder = None,
    config: ConfigPath = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write each expert's task vector; show its norms, and the cosines between them.

    Example: deme task-vector ft_*.safetensors
    """
    run = begin(config, quiet=quiet)

    from deme_cli.merging.lineage import find_base, open_family, open_parents

    parents = open_parents(experts, "expert")
    family = open_family(find_base(parents, run, base), parents)
    paths = [
        (output or parent.path.parent) / f"tv_{parent.record.label}.safetensors"
        for parent in parents
    ]
    _check_outputs(paths, sum(spec.num_bytes for spec in family.base.tensors.values()), force)

    from deme_cli.merging.task_vectors import measure, write_task_vector

    size = family.base.num_parameters
    with console.progress("measuring", size, "parameter") as bar:
        measured = measure(family, bar.advance)
    for index, path in enumerate(paths):
        with console.progress(path.name, size, "parameter") as bar:
            write_task_vector(family, index, measured.norms[index], path, bar.advance)
    _show(family, measured)
    console.result_paths(
        paths,
        as_json=as_json,
        experts=[str(path) for path in experts],
        norms=measured.norms,
        cosines=measured.cosines,
    )


def _check_outputs(paths: Sequence[Path], num_bytes: int, force: bool) -> None:
    """Check that the vectors have names of their own, places to go, and room there."""
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ConfigError(f"two experts would both be written to {path}; choose other folders")
        require_output(path, force=force)
        require_space(path, num_bytes * sum(path.parent == other.parent for other in paths))


def _show(family: Family, measured: Measurements) -> None:
    """The norms, and the cosines where there is more than one expert, sorted by range."""
    order = family.by_range
    labels = [family.parents[index].record.label for index in order]
    names = list(measured.norms[0])
    console.table(
        "Norms of the task vectors (relative: to the norm of the base)",
        ["", *labels],
        [[name, *(f"{measured.norms[i][name]:.4g}" for i in order)] for name in names],
    )
    if len(order) > 1:
        cosines = [
            ["-" if (value := measured.cosines[i][j]) is None else f"{value:.3f}" for j in order]
            for i in order
        ]
        console.table(
            "Cosines between them",
            ["", *labels],
            [[label, *row] for label, row in zip(labels, cosines, strict=True)],
        )
