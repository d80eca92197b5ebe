"""Artifacts: safetensors files with a typed record, read by parts, written whole or not at all.

The reader trusts nothing: lengths, offsets and shapes are checked against the file before a tensor
is touched, without torch. The writer lays a file beside its place, hashes while it writes, syncs
and renames; two writers of one output exclude each other. Fingerprint: SHA-256 over the lines
`name, dtype, shape, SHA-256 of the bytes`, sorted by name, so that equal weights have equal
fingerprints whatever file holds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from deme_cli import foreign_files
from deme_cli.errors import ArtifactError, writing
from deme_cli.outputs import claim, require_space
from deme_cli.records import (
    BaseRecord,
    DenoiserRecord,
    ExpertRecord,
    MergedRecord,
    Record,
    SamplesRecord,
    StatisticsRecord,
    parse_record,
)
from deme_cli.tensor_file import (
    Header,
    TensorSpec,
    layout_of,
    read_header,
    read_pieces,
    tensor_bytes,
)

if TYPE_CHECKING:
    import torch

FORMAT = "pt"  # by which other readers of safetensors know the layout of weights
_WRITEBACK_BYTES = 1 << 23
_THREADED_BYTES = 1 << 18  # below this, handing a piece to a thread costs more than hashing it
_DenoiserKind = Literal["base", "expert", "task-vector", "merged"]
_Written = TypeVar("_Written", bound=Record)


def record_of(header: Header) -> Record:
    """The typed record in a header. Raises ArtifactError if deme did not write the file."""
    if "deme" not in header.metadata:
        raise ArtifactError(foreign_files.told(header.path, header.tensors))
    if (found := header.metadata.get("format")) != FORMAT:
        raise ArtifactError(
            f"{header.path}: its metadata should have format {FORMAT!r}, found {found!r}; the file "
            f"was altered or damaged, make it again"
        )
    return parse_record(header.metadata["deme"], str(header.path))


@overload
def read_record(path: Path, kind: Literal["base"], /) -> BaseRecord: ...
@overload
def read_record(path: Path, kind: Literal["expert"], /) -> ExpertRecord: ...
@overload
def read_record(path: Path, kind: Literal["merged"], /) -> MergedRecord: ...
@overload
def read_record(path: Path, kind: Literal["samples"], /) -> SamplesRecord: ...
@overload
def read_record(path: Path, kind: Literal["statistics"], /) -> StatisticsRecord: ...
@overload
def read_record(path: Path, kind: _DenoiserKind, /, *others: _DenoiserKind) -> DenoiserRecord: ...
@overload
def read_record(path: Path, *kinds: str) -> Record: ...
def read_record(path: Path, *kinds: str) -> Record:
    """The record of the artifact at `path`, checked to be one of `kinds` (any if none is given)."""
    record = record_of(read_header(path))
    if kinds and record.kind not in kinds:
        expected = " or ".join(repr(kind) for kind in kinds)
        raise ArtifactError(
            f"{path}: expected an artifact of kind {expected}, found {record.kind!r}"
        )
    return record


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file with a sound header, as torch tensors on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path}: not a readable safetensors file ({error})") from error


def combine_digests(digests: Mapping[TensorSpec, str]) -> str:
    """The fingerprint of tensors whose bytes have these SHA-256 digests."""
    total = hashlib.sha256()
    for spec, digest in sorted(digests.items(), key=lambda item: item[0].name):
        total.update(f"{spec.name}\0{spec.dtype}\0{list(spec.shape)}\0{digest}\n".encode())
    return total.hexdigest()


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of torch or numpy tensors."""
    return combine_digests(
        {s: hashlib.sha256(tensor_bytes(tensors[s.name])).hexdigest() for s in layout_of(tensors)}
    )


def fingerprint_file(path: Path) -> str:
    """The fingerprint of a safetensors file's tensors, computed from its bytes in small pieces."""
    digests = {}
    with Path(path).open("rb") as file:
        for spec in read_header(path).tensors.values():
            digest = hashlib.sha256()
            for piece in read_pieces(file, spec):
                digest.update(piece)
            digests[spec] = digest.hexdigest()
    return combine_digests(digests)


class ArtifactWriter(Generic[_Written]):
    """Write one artifact in the order of its layout; it appears whole on exit, or not at all.

    with ArtifactWriter(path, layout, record) as writer:
        for spec in layout: writer.write(bytes of spec)   # in any number of pieces
    writer.record                                          # carries the fingerprint

    Large pieces are hashed on a second thread while the first hands them to the file.
    """

    def __init__(self, path: Path, layout: Sequence[TensorSpec], record: _Written) -> None:
        self.path, self.layout, self.record = Path(path), list(layout), record
        self._partial = self.path.parent / f".{self.path.name}.partial"
        self._digests: dict[TensorSpec, str] = {}
        self._current = hashlib.sha256()
        self._filled = 0
        self._handed_over = 0
        from concurrent.futures import ThreadPoolExecutor

        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deme-hash")

    def __enter__(self) -> ArtifactWriter[_Written]:
        require_space(self.path, sum(spec.num_bytes for spec in self.layout))
        self._claim = claim(self.path)
        self._claim.__enter__()
        try:
            with writing(self.path):
                self._file = self._partial.open("wb")
                self._file.write(self._header("0" * 64))
        except BaseException:
            self._abandon()
            raise
        self._close_empty()
        return self

    def write(self, data: Any) -> None:
        """Append bytes of the next tensors of the layout; `data` is free again on return."""
        view = memoryview(data).cast("B")
        if len(view) < _THREADED_BYTES:
            with writing(self.path):
                self._file.write(view)
            self._hash(view)
            return
        hashing = self._hasher.submit(self._hash, view)
        try:
            with writing(self.path):
                self._file.write(view)
        finally:
            hashing.result()
        self._begin_writeback()

    def _begin_writeback(self) -> None:
        """Have the kernel put what is written on the disk already, for a short sync at the end.

        POSIX_FADV_DONTNEED starts that without waiting; only bytes the disk has leave the cache.
        """
        end = self._file.tell()
        if end - self._handed_over >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            begin, self._handed_over = self._handed_over, end
            os.posix_fadvise(self._file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _hash(self, view: memoryview) -> None:
        while len(view):
            spec = self.layout[len(self._digests)]
            taken = view[: spec.num_bytes - self._filled]
            self._current.update(taken)
            self._filled += len(taken)
            view = view[len(taken) :]
            self._close_empty()

    def _close_empty(self) -> None:
        """Close every tensor of the layout that has all its bytes."""
        while len(self._digests) < len(self.layout):
            spec = self.layout[len(self._digests)]
            if self._filled < spec.num_bytes:
                return
            self._digests[spec] = self._current.hexdigest()
            self._current, self._filled = hashlib.sha256(), 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        assert len(self._digests) == len(self.layout), "the artifact lacks tensors of its layout"
        try:
            with writing(self.path):
                total = combine_digests(self._digests)
                self.record = replace(self.record, fingerprint=total)
                self._file.seek(0)
                self._file.write(self._header(total))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._partial, self.path)
        finally:
            self._abandon()

    def _abandon(self) -> None:
        if hasattr(self, "_file"):
            with suppress(OSError):  # a full disk: the partial file goes anyway
                self._file.close()
        self._hasher.shutdown()
        self._partial.unlink(missing_ok=True)
        self._claim.__exit__(None, None, None)

    def _header(self, fingerprint: str) -> bytes:
        position, entries = 0, {}
        for spec in self.layout:
            end = position + spec.num_bytes
            entries[spec.name] = {
                "dtype": spec.dtype, "shape": spec.shape, "data_offsets": [position, end],
            }  # fmt: skip
            position = end
        record = replace(self.record, fingerprint=fingerprint)
        document = {"__metadata__": {"format": FORMAT, "deme": record.to_json()}, **entries}
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def write_artifact(path: Path, tensors: Mapping[str, Any], record: _Written) -> _Written:
    """Write torch or numpy tensors as one artifact; returns the record with its fingerprint."""
    layout = layout_of(tensors)
    with ArtifactWriter(path, layout, record) as writer:
        for spec in layout:
            writer.write(tensor_bytes(tensors[spec.name]))
    return writer.record
