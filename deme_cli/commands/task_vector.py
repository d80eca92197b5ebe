"""`deme task-vector`: the difference each expert made, how long it is, and how alike they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.commands.options import Given, argument, command, flag


@command("base config save_dtype force")
def task_vector(
    experts: Annotated[list[Path], argument("EXPERT", "Experts of one base.")],
    common: Given,
    output: Annotated[Path | None, flag(
        "--output -o", "Folder for the vectors [default: beside each expert]."
    )] = None,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Write each expert's task vector; show its norms, and the cosines between them.

    Example: deme task-vector ft_*.safetensors
    """
    with console.showing() as progress:
        made = deme_cli.task_vector(experts, output=output, progress=progress, **common)
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
        rows = [[label, *row] for label, row in zip(labels, shown, strict=True)]
        console.table("Cosines between them", ["", *labels], rows)
    console.result_paths(
        made.paths, as_json=as_json, experts=[str(path) for path in experts], norms=made.norms,
        cosines=made.cosines,
    )  # fmt: skip
