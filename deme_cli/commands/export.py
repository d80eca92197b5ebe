"""`deme export`: an artifact as a diffusers pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.commands.options import Force, Json, Pipeline, Quiet
from deme_cli.errors import ArtifactError, ConfigError, writing
from deme_cli.outputs import require_space

if TYPE_CHECKING:
    from deme_cli.records import DenoiserRecord
    from deme_cli.tensor_file import Header

_KINDS = ("base", "expert", "merged")
_PROJECTIONS = "channel_projection."

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
    from deme_cli.records import ExpertRecord
    from deme_cli.tensor_file import read_header

    console.set_quiet(quiet)
    header = read_header(merged)
    record = _require_plain_denoiser(header)
    _require_folder(folder, force=force)
    require_space(folder, merged.stat().st_size)

    from deme_cli.diffusion.companions import open_companions
    from deme_cli.diffusion.denoiser import load_denoiser
    from deme_cli.diffusion.export import export_pipeline
    from deme_cli.diffusion.model_card import model_card

    companions = open_companions(record, pipeline=pipeline)
    card = model_card(record, merged)
    check = export_pipeline(load_denoiser(merged), companions, folder, card, force=force)
    if isinstance(record, ExpertRecord):
        console.warn(f"{merged} is the expert of timesteps {record.timesteps} only")
    console.note(
        f"check: the pipeline, loaded again, differs from {merged} by at most "
        f"{check.max_difference:.3g} at timesteps {', '.join(map(str, check.timesteps))} (float32)"
    )
    console.note(f"fill in the licence in {folder / 'README.md'} before you share it")
    console.result_paths(
        [folder], as_json=as_json, max_difference=check.max_difference, timesteps=check.timesteps,
        fingerprint=record.fingerprint,
    )  # fmt: skip


def _require_plain_denoiser(header: Header) -> DenoiserRecord:
    """The record of an artifact that plain diffusers can hold."""
    from deme_cli.artifacts import record_of

    record = record_of(header)
    if record.kind not in _KINDS:
        raise ArtifactError(
            f"{header.path}: expected a base, expert or merged artifact, found {record.kind!r}"
        )
    if any(name.startswith(_PROJECTIONS) for name in header.tensors):
        raise ArtifactError(
            f"{header.path}: carries block projections, which no diffusers network has and which "
            f"cannot be folded into one (skips are taken before them); finetune with "
            f"--projection fold to export, or use it with `deme sample`"
        )
    return record


def _require_folder(folder: Path, *, force: bool) -> None:
    """Only an exported pipeline is ever replaced, and only with --force."""
    with writing(folder):
        if not folder.exists():
            return
    if not force:
        raise ConfigError(f"{folder} exists; add --force to replace it, or choose another DIR")
    if not (folder / "model_index.json").exists():
        raise ConfigError(
            f"{folder} is no diffusers pipeline and is not replaced; choose another DIR"
        )
