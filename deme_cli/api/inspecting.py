"""`inspect`: what artifacts say of themselves, and whether their tensors are still those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.errors import ArtifactError

if TYPE_CHECKING:
    from deme_cli.artifacts import Record
    from deme_cli.files import Header


@dataclass(frozen=True)
class Inspected:
    """An artifact's header and the record in it."""

    header: Header
    record: Record


def inspect(files: Sequence[Path], *, verify: bool = False) -> list[Inspected]:
    """Read the headers and records of artifacts of any kind.

    verify: compute every fingerprint again, which reads all tensors. Raises ArtifactError for a
    file that is no artifact, or whose tensors are not those of its record; MissingError.
    """
    from deme_cli.artifacts import fingerprint_file, record_of
    from deme_cli.files import read_header

    headers = [read_header(Path(path)) for path in files]
    found = [Inspected(header, record_of(header)) for header in headers]
    for one in found if verify else ():
        path, computed = one.header.path, fingerprint_file(one.header.path)
        if computed != one.record.fingerprint:
            raise ArtifactError(
                f"{path}: its tensors have fingerprint {computed}, its record says "
                f"{one.record.fingerprint}; the file was altered or damaged, make it again"
            )
        console.note(f"{path}: the fingerprint is right")
    return found
