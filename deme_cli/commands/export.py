"""`deme export`: an artifact as a diffusers pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.artifacts import read_record
from deme_cli.commands.options import Force, Json, Pipeline, Quiet

Merged = Annotated[
    Path,
    typer.Argument(
        metavar="MERGED", help="A merged artifact; a base or an expert also.", show_default=False
    ),
]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The pipeline folder to write.", show_default=False)
]


def export(
    merged: Merged,
    folder: Folder,
    pipeline: Pipeline = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a diffusers pipeline folder with a model card, and check it against the artifact.

    Example: deme export merged.safetensors my-ddpm
    """
    import deme_cli as deme

    console.set_quiet(quiet)
    check = deme.export(merged, folder, pipeline=pipeline, force=force)
    console.note(
        f"check: the pipeline, loaded again, differs from {merged} by at most "
        f"{check.max_difference:.3g} at timesteps {', '.join(map(str, check.timesteps))} (float32)"
    )
    console.note(f"fill in the licence in {folder / 'README.md'} before you share it")
    console.result_paths(
        [folder], as_json=as_json, max_difference=check.max_difference, timesteps=check.timesteps,
        fingerprint=read_record(merged).fingerprint,
    )  # fmt: skip
