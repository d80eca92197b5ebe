"""`deme import`: weights that were trained elsewhere, as an expert of a base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.artifacts import read_record
from deme_cli.commands.options import Given, argument, command, flag


@command("config save_dtype force")
def import_expert(
    source: Annotated[str, argument(
        "FILE|DIR", "A state dict, a LoRA, or a diffusers folder or hub id."
    )],
    range: Annotated[str, flag("--range", "Its timesteps: i/N as in 2/4, or start:stop.")],
    common: Given,
    base: Annotated[Path | None, flag("--base", "Its base [default: that of deme.toml].")] = None,
    variant: Annotated[str | None, flag(
        "--variant", "Of a folder with several sets of weights: which, as fp16 or non_ema."
    )] = None,
    output: Annotated[Path | None, flag(
        "--output -o", "Artifact to write [default: ft_{i}of{N}.safetensors]."
    )] = None,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Take weights that were trained elsewhere as an expert of a base.

    Every parameter is checked against the base. task-vector, merge and the
    other commands then take the expert as any other.

    Example: deme import unet_ema --base base.safetensors --range 750:1000
    """
    path = deme_cli.import_expert(
        source, range, base=base, output=output, variant=variant, **common
    )
    record = read_record(path, "expert")
    told = record.imported or {}
    console.note(
        f"{path}: the expert of timesteps {record.timesteps}, from {source} ({told['form']}, "
        f"sha256 {told['sha256'][:12]})"
    )
    console.result_paths(
        [path], as_json=as_json, range=record.range, base=record.base, imported=told,
        fingerprint=record.fingerprint,
    )  # fmt: skip
