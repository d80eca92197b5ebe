"""`deme export`: an artifact as a diffusers pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.artifacts import read_record
from deme_cli.commands.options import Given, argument, command


@command("pipeline save_dtype force")
def export(
    merged: Annotated[Path, argument("MERGED", "A merged artifact; a base or an expert also.")],
    folder: Annotated[Path, argument("DIR", "The pipeline folder to write.")],
    common: Given,
    as_json: bool = False,
) -> None:
    """Write a diffusers pipeline folder with a model card, and check it against the artifact.

    Example: deme export merged.safetensors my-ddpm
    """
    check = deme_cli.export(merged, folder, **common)
    console.note(
        f"check: the pipeline, loaded again, differs from {merged} by at most "
        f"{check.max_difference:.3g} at timesteps {', '.join(map(str, check.timesteps))} (float32)"
    )
    console.note(f"fill in the licence in {folder / 'README.md'} before you share it")
    console.result_paths(
        [folder], as_json=as_json, max_difference=check.max_difference, timesteps=check.timesteps,
        fingerprint=read_record(merged).fingerprint,
    )  # fmt: skip
