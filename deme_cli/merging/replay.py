"""Replay: a merged artifact made again from its base and experts, bit for bit, and checked.

The record says what was merged and how; files are found by name and known by their fingerprint. The
new file takes the header of the old one as it stands (who made it, its search, its report), and
appears only if the weights under it have the fingerprint that the header tells. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deme_cli.artifacts import BaseRecord, MergedRecord, fingerprint_file, record_of
from deme_cli.errors import (
    ArtifactError,
    DemeError,
    MissingError,
    NumericsError,
    writing,
)
from deme_cli.files import Header, read_header, require_output
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.combine import PlannedMerge, plan_merge, write_merge
from deme_cli.merging.inputs import BASE_NAME, Inputs, find_base, open_experts, open_inputs
from deme_cli.merging.merge import MergeResult
from deme_cli.merging.methods import METHODS, USES, MethodSettings
from deme_cli.run_file import RunFile

FINDS_ITS_OWN = ("model-stock",)  # methods that take no coefficients


def replay(
    merged: Path,
    output: Path | None = None,
    *,
    experts: Sequence[Path] = (),
    base: Path | None = None,
    run: RunFile | None = None,
    force: bool = False,
) -> MergeResult:
    """Make the merged artifact `merged` again as its record tells it, bit for bit.

    output: None for {merged}.replayed.safetensors.   experts, base: where they are now, if not
    where they were.   run: names the base, if not beside the merged file.

    Raises MissingError naming what is not found, ArtifactError naming a file that differs or a
    method that this deme has not, NumericsError where the result differs although base and experts
    do not. Then no output appears.
    """
    output = output or merged.with_name(f"{merged.stem}.replayed.safetensors")
    require_output(output, force=force)
    header = read_header(merged)
    record = record_of(header)
    if not isinstance(record, MergedRecord):
        raise ArtifactError(
            f"{merged}: expected an artifact of kind 'merged', found {record.kind!r}"
        )
    if record.method not in METHODS:
        raise ArtifactError(
            f"{merged}: was merged by method {record.method!r}, which this deme does not have "
            f"({', '.join(METHODS)}); use the file as it is, or the deme that wrote it "
            f"({record.created_by})"
        )
    inputs = _find_inputs(header, record, experts, base, run or RunFile())
    partial = output.with_name(f".{output.name}.replay")
    try:
        made = write_merge(_plan(inputs, header, record), record, partial)
        if made.fingerprint != record.fingerprint:
            raise _culprit(inputs, merged, record, made.fingerprint)
        _put_header(header, partial)
        with writing(output):
            os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return MergeResult(output)


def _find_inputs(
    header: Header, record: MergedRecord, given: Sequence[Path], base: Path | None, run: RunFile
) -> Inputs:
    """The recorded experts in their order, with their base."""
    beside = header.path.parent
    found = [_find(header.path, expert, given) for expert in record.parents]
    opened = open_experts(found, "expert", "task-vector")
    if base is None:
        for place in (beside / BASE_NAME, *sorted(beside.glob("*base*.safetensors"))):
            own = record_of(read_header(place)) if place.is_file() else None
            if isinstance(own, BaseRecord) and own.fingerprint == record.base:
                return open_inputs(place, opened)
    return open_inputs(find_base(opened, run, base), opened)


def _find(merged: Path, expert: dict[str, Any], given: Sequence[Path]) -> Path:
    """The file of a recorded expert: given, at its recorded path, or beside the merged file."""
    path, wanted, others = Path(expert["path"]), expert["fingerprint"], []
    for place in (*given, path, merged.parent / path, merged.parent / path.name):
        if place.is_file():
            fingerprint = record_of(read_header(place)).fingerprint
            if fingerprint == wanted:
                return place
            if place.name == path.name:
                others.append(f"{place} ({fingerprint[:12]})")
    if others:
        raise ArtifactError(
            f"{', '.join(dict.fromkeys(others))}: not the expert that {merged} was made from, "
            f"{wanted[:12]}; give the right file"
        )
    raise MissingError(
        f"{expert['path']}: not found; {merged} was made from it (fingerprint {wanted[:12]}); "
        f"give its file"
    )


def _plan(inputs: Inputs, header: Header, record: MergedRecord) -> PlannedMerge:
    """The merge that the record tells, its tensors in the order of the old file."""
    used = {name: record.settings[name] for name in USES.get(record.method, ())
            if name in record.settings}  # fmt: skip
    finer = {glob: tuple(values) for glob, values in record.coefficients_for.items()}
    given = Coefficients(tuple(record.coefficients), finer)
    plan = plan_merge(
        inputs,
        None if record.method in FINDS_ITS_OWN else given,
        MethodSettings(record.method, **used),
    )
    names = sorted(header.tensors, key=lambda name: header.tensors[name].begin)
    if set(names) != {spec.name for spec in plan.layout}:
        raise ArtifactError(f"{header.path}: does not have the tensors of its base and parents")
    by_name = {spec.name: spec for spec in plan.layout}
    return replace(plan, layout=[by_name[name] for name in names])


def _culprit(inputs: Inputs, merged: Path, record: MergedRecord, made: str) -> DemeError:
    """Why the result differs: a file whose weights are not those of its record, or the numbers."""
    for path, fingerprint in (
        (inputs.base.path, inputs.base_record.fingerprint),
        *((expert.path, expert.record.fingerprint) for expert in inputs.experts),
    ):
        if (found := fingerprint_file(path)) != fingerprint:
            return ArtifactError(
                f"{path}: its weights have the fingerprint {found[:12]}, its record says "
                f"{fingerprint[:12]}; copy or make the file again"
            )
    return NumericsError(
        f"{merged}: made again from the same files its weights have the fingerprint {made[:12]}, "
        f"its record says {record.fingerprint[:12]}; it was made otherwise than recorded"
    )


def _put_header(header: Header, partial: Path) -> None:
    """Give `partial`, which has the same tensors in the same order, the old file's header."""
    old, new = _header_bytes(header.path), _header_bytes(partial)
    if old == new:
        return
    whole = partial.with_name(f"{partial.name}.whole")  # an older deme wrote fewer fields
    try:
        with writing(partial), partial.open("rb") as source, whole.open("wb") as file:
            file.write(old)
            source.seek(len(new))
            while piece := source.read(1 << 22):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, partial)
    finally:
        whole.unlink(missing_ok=True)


def _header_bytes(path: Path) -> bytes:
    """The length and the JSON before the tensors."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return prefix + file.read(int.from_bytes(prefix, "little"))
