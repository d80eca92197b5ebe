"""Replay: a merged artifact made again from its base and experts, bit for bit, and checked.

The record says what was merged and how; files are found by name and known by their fingerprint. The
new file takes the header of the old one as it stands (who made it, its search, its report), and
appears only if the weights under it have the fingerprint that the header tells. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from deme_cli.artifacts import MergedRecord, fingerprint_file, record_of
from deme_cli.errors import ArtifactError, DemeError, MissingError, NumericsError
from deme_cli.files import read_header, require_output, write_whole
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.combine import plan_merge, write_sums
from deme_cli.merging.inputs import Inputs, find_base, open_experts, open_inputs
from deme_cli.merging.merge import MergeResult
from deme_cli.merging.methods import METHODS, USES, MethodSettings
from deme_cli.run_file import RunFile

_CHUNK = 1 << 22  # bytes


def replay(
    merged: Path, output: Path | None = None, *, experts: Sequence[Path] = (),
    base: Path | None = None, run: RunFile | None = None, force: bool = False,
) -> MergeResult:  # fmt: skip
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
    opened = open_experts(
        [_find(merged, expert, experts) for expert in record.parents], "expert", "task-vector"
    )
    inputs = open_inputs(find_base(opened, run or RunFile(), base, merged.parent), opened)
    used = {k: v for k, v in record.settings.items() if k in USES.get(record.method, ())}
    finer = {glob: tuple(values) for glob, values in record.coefficients_for.items()}
    given = Coefficients(tuple(record.coefficients), finer)
    plan = plan_merge(
        inputs, None if record.method == "model-stock" else given,
        MethodSettings(record.method, **used),
    )  # fmt: skip
    layout = sorted(header.tensors.values(), key=lambda spec: spec.begin)
    if {spec.name for spec in layout} != {spec.name for spec in plan.layout}:
        raise ArtifactError(f"{merged}: does not have the tensors of its base and parents")
    partial = output.with_name(f".{output.name}.replay")
    try:
        made = write_sums(
            inputs, plan.terms, layout, record, partial, transform=plan.method.transform
        ).fingerprint
        if made != record.fingerprint:
            raise _culprit(inputs, merged, record, made)
        write_whole(output, chain([_header_bytes(merged)], _tensors(partial)))
    finally:
        partial.unlink(missing_ok=True)
    return MergeResult(output)


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


def _culprit(inputs: Inputs, merged: Path, record: MergedRecord, made: str) -> DemeError:
    """Why the result differs: a file whose weights are not those of its record, or the numbers."""
    for header in inputs.headers:
        found, told = fingerprint_file(header.path), record_of(header).fingerprint
        if found != told:
            return ArtifactError(
                f"{header.path}: its weights have the fingerprint {found[:12]}, its record says "
                f"{told[:12]}; copy or make the file again"
            )
    return NumericsError(
        f"{merged}: made again from the same files its weights have the fingerprint {made[:12]}, "
        f"its record says {record.fingerprint[:12]}; it was made otherwise than recorded"
    )


def _header_bytes(path: Path) -> bytes:
    """The length and the JSON before the tensors."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return prefix + file.read(int.from_bytes(prefix, "little"))


def _tensors(path: Path) -> Iterator[bytes]:
    """What is behind the header, in pieces."""
    with path.open("rb") as file:
        file.seek(len(_header_bytes(path)))
        yield from iter(lambda: file.read(_CHUNK), b"")
