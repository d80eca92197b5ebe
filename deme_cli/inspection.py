"""What files of weights are, as their headers tell, and whether their tensors are what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deme_cli.artifacts import (
    EXPORTED,
    MergedRecord,
    Record,
    fingerprint_file,
    parse_record,
    record_of,
)
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ArtifactError, reading
from deme_cli.files import Header, foreign_kind, pickled_names, read_header
from deme_cli.model_spec import DIGEST, model_spec

_DAMAGED = "the file was altered or damaged, make it again"


@dataclass(frozen=True)
class Inspected:
    """A file's header and the record in it; of one that is no artifact, what it is instead.

    made_of: of one that `deme export` wrote, the record of what it was made of.   A pickle has no
    header that could be read: its own is empty.
    """

    header: Header
    record: Record | None
    foreign: str = ""
    todo: str = ""
    made_of: Record | None = None


def inspect(
    files: Sequence[Path], *, verify: bool = False, progress: Progress = silent
) -> list[Inspected]:
    """Read the headers and records of artifacts of any kind; tell what other files of weights are.

    verify: compute every fingerprint again, which reads all tensors; of a file without a record the
    SHA-256 that its metadata hold. Raises ArtifactError for a file without tensors, without
    anything to verify, or whose tensors are others; MissingError.
    """
    found = [_inspect(Path(path)) for path in files]
    for one in found if verify else ():
        progress(Step(note=f"{one.header.path}: the {_verified(one)} is right"))
    return found


def _inspect(path: Path) -> Inspected:
    try:
        header = read_header(path)
    except ArtifactError:
        if not path.is_file() or not (names := pickled_names(path)):
            raise
        return Inspected(Header(path, {}, {}), None, *foreign_kind(names))
    if "deme" in header.metadata:
        return Inspected(header, record_of(header))
    origin = header.metadata.get(EXPORTED)
    return Inspected(
        header, None, *foreign_kind(header.tensors),
        None if origin is None else parse_record(origin, str(path)),
    )  # fmt: skip


def _verified(one: Inspected) -> str:
    """What the file's tensors were held against. Raises ArtifactError where they differ."""
    path, told = one.header.path, one.header.metadata
    if one.record is None:
        if DIGEST not in told:  # also a damaged name of the record
            raise ArtifactError(f"{path}: {one.foreign}, without a fingerprint to verify")
        with reading(path), path.open("rb") as file:
            file.seek(min(spec.begin for spec in one.header.tensors.values()))
            computed = hashlib.file_digest(file, "sha256").hexdigest()
        if computed != told[DIGEST].lower().removeprefix("0x"):
            raise ArtifactError(
                f"{path}: its tensors have SHA-256 {computed}, its metadata say {told[DIGEST]} "
                f"({DIGEST}); {_DAMAGED}"
            )
        return f"SHA-256 of its tensors ({DIGEST})"
    computed = fingerprint_file(path)
    if computed != one.record.fingerprint:
        raise ArtifactError(
            f"{path}: its tensors have fingerprint {computed}, its record says "
            f"{one.record.fingerprint}; {_DAMAGED}"
        )
    if isinstance(one.record, MergedRecord) and one.record.created_by == Record.created_by:
        is_there = "modelspec." in str(told)  # a tool may have left them out, or added to them
        if is_there and not model_spec(one.record).items() <= told.items():
            raise ArtifactError(
                f"{path}: its metadata (modelspec) do not follow from its record; {_DAMAGED}"
            )
    return "fingerprint"
