"""Who denoises which timesteps: experts of one base that together cover [0, T), or one model.

The checks read headers only; torch is loaded when the experts are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli.artifacts import DenoiserRecord, ExpertRecord, read_record
from deme_cli.errors import ArtifactError
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, require_cover

if TYPE_CHECKING:
    from deme_cli.diffusion.denoiser import Denoiser

_SHARED = {
    "base": "base",
    "num_train_timesteps": "number of timesteps",
    "model_config": "model config",
    "scheduler_config": "scheduler config",
    "companions": "set of frozen parts",
}


@dataclass(frozen=True)
class SamplingExpert:
    """Who denoises `range`. `load` is called once, or once per chunk where not all are held."""

    range: TimestepRange
    load: Callable[[], Denoiser]


def single(denoiser: Denoiser) -> list[SamplingExpert]:
    """One denoiser as an ensemble of one, for [0, T)."""
    whole = TimestepRange(0, denoiser.schedule.num_train_timesteps)
    return [SamplingExpert(whole, lambda: denoiser)]


def open_single(
    argument: str, *, run: RunFile | None = None, pipeline: str | None = None,
    device: str = "cpu", dtype: str = "fp32",
) -> tuple[list[SamplingExpert], DenoiserRecord]:  # fmt: skip
    """The model that an argument names, and its record.

    An artifact is loaded when its weights are needed; a folder at once, for it tells its
    fingerprint only by its weights. Raises what `locate_model` and `open_denoiser` raise.
    """
    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.diffusion.denoiser import choose_device
    from deme_cli.diffusion.model_files import locate_model

    choose_device(device)
    path = locate_model(argument)
    load = partial(open_denoiser, argument, run=run, pipeline=pipeline, device=device, dtype=dtype)
    if not path.is_file():
        denoiser = load()
        return single(denoiser), denoiser.record
    record = read_record(path, "base", "expert", "merged")
    return [SamplingExpert(TimestepRange(0, record.num_train_timesteps), load)], record


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
        for name, label in _SHARED.items():
            expected, other = getattr(first.record, name), getattr(member.record, name)
            if expected != other:
                values = f" ({other!s:.12}, not {expected!s:.12})" if label == "base" else ""
                raise ArtifactError(
                    f"{member.path}: another {label} than {first.path}{values}; an ensemble needs "
                    f"experts of one base"
                )
    require_cover([m.record.timesteps for m in members], first.record.num_train_timesteps)
    return members


def open_ensemble(
    paths: Sequence[Path], *, run: RunFile | None = None, device: str = "cpu", dtype: str = "fp32"
) -> list[SamplingExpert]:
    """The experts of an ensemble, ready to be loaded when their timesteps come.

    Those that hold adapters share one base in memory. Raises what `read_ensemble` raises, and what
    `choose_device` says of the device.
    """
    from deme_cli.diffusion.denoiser import choose_device, load_denoiser

    choose_device(device)
    members, load = read_ensemble(paths), partial(load_denoiser, device=device, dtype=dtype)
    if any(member.record.holds == "adapter" for member in members):
        from deme_cli.diffusion.adapters import open_adapted

        with_adapters = open_adapted(load, run)
        return [
            SamplingExpert(
                one.record.timesteps,
                partial(with_adapters if one.record.holds == "adapter" else load, one.path),
            )
            for one in members
        ]
    return [SamplingExpert(one.record.timesteps, partial(load, one.path)) for one in members]
