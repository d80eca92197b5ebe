"""`deme task-vector`: the difference each expert made, how long it is, and how alike they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.commands.options import Base, ConfigPath, Force, Json, Quiet, begin

if TYPE_CHECKING:
    from deme_cli import TaskVectors


def task_vector(
    experts: Annotated[
        list[Path],
        typer.Argument(metavar="EXPERT", help="Experts of one base.", show_default=False),
    ],
    base: Base = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=r"Folder for the vectors \[default: beside each expert].",
            show_default=False,
        ),
    ] = None,
    config: ConfigPath = None, force: Force = False, as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write each expert's task vector; show its norms, and the cosines between them.

    Example: deme task-vector ft_*.safetensors
    """
    import deme_cli

    run = begin(config, quiet=quiet)
    with console.showing() as progress:
        made = deme_cli.task_vector(
            experts, base=base, output=output, run=run, force=force, progress=progress
        )
    _show(made)
    console.result_paths(
        made.paths, as_json=as_json, experts=[str(path) for path in experts], norms=made.norms,
        cosines=made.cosines,
    )  # fmt: skip


def _show(made: TaskVectors) -> None:
    """The norms, and the cosines where there is more than one expert, sorted by range."""
    order = made.inputs.by_range
    labels = [made.inputs.experts[index].record.label for index in order]
    names = list(made.norms[0])
    digits = console.decimals((norms[name] for norms in made.norms for name in names), 3)
    console.table(
        "Norms of the task vectors (relative: to the norm of the base)", ["", *labels],
        [[name, *(f"{made.norms[i][name]:.{digits}f}" for i in order)] for name in names],
    )  # fmt: skip
    if len(order) > 1:
        cosines = [[made.cosines[i][j] for j in order] for i in order]
        shown = [["-" if value is None else f"{value:.3f}" for value in row] for row in cosines]
        console.table(
            "Cosines between them", ["", *labels],
            [[label, *row] for label, row in zip(labels, shown, strict=True)],
        )  # fmt: skip
