"""Experts of one base that together denoise [0, T): which files make an ensemble, and opening them.

The checks read headers only; torch is loaded when the experts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli.artifacts import ExpertRecord, read_record
from deme_cli.errors import ArtifactError
from deme_cli.timesteps import require_cover

if TYPE_CHECKING:
    from deme_cli.sampling.sampler import SamplingExpert

_SHARED = {
    "base": "base",
    "num_train_timesteps": "number of timesteps",
    "model_config": "model config",
    "scheduler_config": "scheduler config",
    "companions": "set of frozen parts",
}


@dataclass(frozen=True)
class Member:
    """One expert of an ensemble: its file and what its header says."""

    path: Path
    record: ExpertRecord


def read_ensemble(paths: Sequence[Path]) -> list[Member]:
    """The experts in these files, in order of their ranges, which cover [0, T) exactly once.

    Raises ArtifactError if a file is no expert, if the experts differ in base, schedule or
    architecture, or if their ranges leave a gap or overlap.
    """
    members = [Member(path, read_record(path, "expert")) for path in paths]
    if not members:
        raise ArtifactError("an ensemble needs at least one expert")
    members.sort(key=lambda member: member.record.timesteps)
    first = members[0]
    for member in members[1:]:
        _require_kin(first, member)
    require_cover([m.record.timesteps for m in members], first.record.num_train_timesteps)
    return members


def _require_kin(first: Member, member: Member) -> None:
    for name, label in _SHARED.items():
        expected, found = getattr(first.record, name), getattr(member.record, name)
        if expected != found:
            values = f" ({found!s:.12}, not {expected!s:.12})" if label == "base" else ""
            raise ArtifactError(
                f"{member.path}: another {label} than {first.path}{values}; "
                f"an ensemble needs experts of one base"
            )


def open_ensemble(
    paths: Sequence[Path], *, device: str = "cpu", dtype: str = "fp32"
) -> list[SamplingExpert]:
    """The experts of an ensemble, ready to be loaded when their timesteps come.

    Raises what `read_ensemble` raises, and what `choose_device` says of the device.
    """
    from deme_cli.diffusion.denoiser import choose_device, load_denoiser
    from deme_cli.sampling.sampler import SamplingExpert

    choose_device(device)
    return [
        SamplingExpert(
            member.record.timesteps,
            partial(load_denoiser, member.path, device=device, dtype=dtype),
        )
        for member in read_ensemble(paths)
    ]
