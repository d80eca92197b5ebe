"""`export`: an artifact as a diffusers pipeline folder that anybody can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.errors import ArtifactError, ConfigError, writing
from deme_cli.files import require_space

if TYPE_CHECKING:
    from deme_cli.artifacts import DenoiserRecord
    from deme_cli.diffusion.export import ExportCheck
    from deme_cli.files import Header

_PROJECTIONS = "channel_projection."


def export(
    artifact: Path, folder: Path, *, pipeline: str | None = None, force: bool = False
) -> ExportCheck:
    """Write a diffusers pipeline folder with a model card; load it again and compare.

    artifact: a merged artifact, a base or an expert.   pipeline: where the frozen parts of a latent
    model are; None for where it came from. Raises ArtifactError (block projections, another kind of
    artifact), ConfigError (the folder exists), MissingError.
    """
    from deme_cli.artifacts import ExpertRecord
    from deme_cli.files import read_header

    record = _require_plain_denoiser(read_header(artifact))
    _require_folder(folder, force=force)
    require_space(folder, artifact.stat().st_size)

    from deme_cli.diffusion.companions import open_companions
    from deme_cli.diffusion.denoiser import load_denoiser
    from deme_cli.diffusion.export import export_pipeline
    from deme_cli.diffusion.model_card import model_card

    companions = open_companions(record, pipeline=pipeline)
    card = model_card(record, artifact)
    check = export_pipeline(load_denoiser(artifact), companions, folder, card, force=force)
    if isinstance(record, ExpertRecord):
        console.warn(f"{artifact} is the expert of timesteps {record.timesteps} only")
    return check


def _require_plain_denoiser(header: Header) -> DenoiserRecord:
    """The record of an artifact that plain diffusers can hold."""
    from deme_cli.artifacts import (
        BaseRecord,
        ExpertRecord,
        MergedRecord,
        TaskVectorRecord,
        record_of,
    )

    record = record_of(header)
    is_vector = isinstance(record, TaskVectorRecord)
    if is_vector or not isinstance(record, (BaseRecord, ExpertRecord, MergedRecord)):
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
