"""Which files belong together: the experts or task vectors of one merge, and the base they share.

Everything here reads headers only: kinds, base fingerprints, names, shapes, dtypes. What passes can
be combined; what does not is told with the first name that disagrees. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deme_cli.artifacts import BaseRecord, ExpertRecord, record_of
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.files import Header, TensorSpec, read_header
from deme_cli.run_file import RunFile, locate_base
from deme_cli.timesteps import TimestepRange, require_cover

PROJECTION = "channel_projection."  # diffusion.projection.PREFIX, which lies behind torch
COMPUTED_IN: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f4"), "BF16": np.dtype("<f4"),
}  # fmt: skip
INTEGERS = frozenset({"I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL"})


@dataclass(frozen=True)
class Expert:
    """An expert or its task vector: its header, its record, and how it is read.

    fingerprint: of the expert, also where only its task vector is at hand.   is_vector: whether its
    tensors are the differences to the base (see `TensorStream.numbers`).
    """

    header: Header
    record: ExpertRecord
    fingerprint: str
    is_vector: bool = False

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def holds_adapters(self) -> bool:
        """Whether its file has low-rank factors alone, from which its differences are made."""
        return self.record.holds == "adapter"


@dataclass(frozen=True)
class Inputs:
    """A base and the experts finetuned from it, checked to agree.

    `projections` are the block projections that every expert has and the base has not.
    """

    base: Header
    base_record: BaseRecord
    experts: tuple[Expert, ...]

    @property
    def projections(self) -> list[TensorSpec]:
        return [
            spec for spec in self.experts[0].header.tensors.values() if is_projection(spec.name)
        ]

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors of a merge: those of the base, and the projections."""
        return [*self.base.tensors.values(), *self.projections]

    @property
    def headers(self) -> list[Header]:
        """The base's header, then those of the experts'."""
        return [self.base, *(expert.header for expert in self.experts)]

    @property
    def by_range(self) -> list[int]:
        """Numbers of the experts, sorted by their ranges of timesteps."""
        return sorted(range(len(self.experts)), key=lambda i: self.experts[i].record.range)

    @cached_property
    def ensemble(self) -> list[int] | None:
        """Numbers of the experts that make the ensemble, in the order of their ranges, the first of
        each; None where these do not cover [0, T) once."""
        first: dict[TimestepRange, int] = {}
        for index in self.by_range:
            first.setdefault(self.experts[index].record.timesteps, index)
        try:
            require_cover(list(first), self.base_record.num_train_timesteps)
        except ArtifactError:
            return None
        return list(first.values())


def is_projection(name: str) -> bool:
    return name.startswith(PROJECTION)


def open_experts(paths: Sequence[Path], *kinds: str) -> list[Expert]:
    """The headers and records of experts (and task vectors), in the order given.

    Raises ArtifactError on another kind, ConfigError where one expert is given twice.
    """
    experts: list[Expert] = []
    for path in paths:
        header = read_header(path)
        record = record_of(header, *kinds)
        is_vector = record.kind == "task-vector" or record.holds == "adapter"
        fingerprint = record.expert if record.kind == "task-vector" else record.fingerprint
        for other in experts:
            if (fingerprint, record.base, record.range) == (
                other.fingerprint, other.record.base, other.record.range
            ):  # fmt: skip
                raise ConfigError(f"{other.path} and {path} are the same expert; give it once")
        experts.append(Expert(header, record, fingerprint, is_vector))
    return experts


def find_base(
    experts: Sequence[Expert], run: RunFile, given: Path | None, beside: Path | None = None
) -> Path:
    """The base the experts were finetuned from, as `locate_base` finds it."""
    return locate_base(experts[0].path, experts[0].record.base, run, given, beside)


def open_inputs(base: Path, experts: Sequence[Expert]) -> Inputs:
    """The experts with their base, after every check that headers allow.

    Raises ArtifactError naming the file and the first tensor, or the fingerprints, that disagree.
    """
    header = read_header(base)
    record = record_of(header, "base")
    inputs = Inputs(header, record, tuple(experts))
    for expert in experts:
        if expert.record.base != record.fingerprint:
            raise ArtifactError(
                f"{expert.path}: was finetuned from base {expert.record.base[:12]}, "
                f"{base} is {record.fingerprint[:12]}; merge experts of one base"
            )
        if expert.holds_adapters:
            _require_fitting(header, expert.header)
        else:
            require_same_tensors(header, expert.header, projections=False)
        require_same_tensors(experts[0].header, expert.header, projections=True)
    for spec in inputs.specs:
        if spec.dtype not in COMPUTED_IN and (
            spec.dtype not in INTEGERS or is_projection(spec.name)
        ):
            raise ArtifactError(
                f"{base}: {spec.name!r} of {spec.dtype} cannot be subtracted or merged; expected "
                f"{', '.join(COMPUTED_IN)} or integers"
            )
    for spec in inputs.projections:
        if len(spec.shape) != 2 or spec.shape[0] != spec.shape[1]:
            raise ArtifactError(
                f"{experts[0].path}: {spec.name!r} has shape {list(spec.shape)}; "
                f"a channel projection is a square matrix"
            )
    return inputs


def changed_by(adapters: Header) -> dict[str, tuple[str, str]]:
    """The names of A and B for each tensor that the adapters in a file change.

    They are called unet.LAYER.lora_A.weight, or of another part of the pipeline.
    """
    ends = (".lora_A.weight", ".lora_B.weight")
    names = [name.removesuffix(ends[0]) for name in adapters.tensors if name.endswith(ends[0])]
    return {f"{name.partition('.')[2]}.weight": (name + ends[0], name + ends[1]) for name in names}


def _require_fitting(base: Header, adapters: Header) -> None:
    """Check that adapters are pairs of factors of the base's tensors."""
    changed = changed_by(adapters)
    alone = adapters.tensors.keys() - {name for pair in changed.values() for name in pair}
    for name in sorted(alone):
        raise ArtifactError(f"{adapters.path}: {name!r} is no factor of a pair")
    for name, pair in changed.items():
        down, up = (adapters.tensors.get(side) for side in pair)
        shape = base.tensors[name].shape if name in base.tensors else None
        made = None
        if up is not None and down is not None and up.shape[1:2] == down.shape[:1]:
            made = (up.shape[0], *down.shape[1:])
        if made is None or made != shape:
            raise ArtifactError(
                f"{adapters.path}: {pair[0]!r} and its partner are no factors of {name!r} "
                f"{list(shape or ())} in {base.path}"
            )


def require_same_tensors(first: Header, other: Header, *, projections: bool) -> None:
    """Check names and shapes of the projections, or of all but these; dtypes but for floats."""
    left, right = (
        {name: spec for name, spec in header.tensors.items() if is_projection(name) == projections}
        for header in (first, other)
    )
    for name in sorted(left.keys() | right.keys()):
        hint = "; merge experts trained with the same --projection" if projections else ""
        if name not in right:
            raise ArtifactError(f"{other.path}: lacks {name!r}, which {first.path} has{hint}")
        if name not in left:
            raise ArtifactError(f"{other.path}: has {name!r}, which {first.path} lacks{hint}")
        expected, found = left[name], right[name]
        is_float = expected.dtype in COMPUTED_IN and found.dtype in COMPUTED_IN
        if expected.shape != found.shape or (expected.dtype != found.dtype and not is_float):
            raise ArtifactError(
                f"{other.path}: {name!r} is {found.dtype} {list(found.shape)}, "
                f"{first.path} has {expected.dtype} {list(expected.shape)}"
            )
