"""Artifacts: safetensors files with a typed record, written whole or not at all.

A record is JSON in the safetensors metadata under the key `deme`, so reading one needs no tensor
and no torch. There are six kinds. Fields absent from a file fail by name; unknown fields of a newer
minor version are ignored; a newer `version` is refused. The text ends in a checksum of itself: a
damaged record is refused wherever it is read.

The writer lays a file beside its place, hashes while it writes, syncs and renames; two writers of
one output exclude each other. Fingerprint: SHA-256 over the lines `name, dtype, shape, SHA-256 of
the bytes`, sorted by name, so that equal weights have equal fingerprints whatever file holds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, overload

from deme_cli import __version__
from deme_cli.errors import ArtifactError, shown, writing
from deme_cli.files import (
    Header,
    TensorSpec,
    foreign_message,
    layout_of,
    read_header,
    require_intact,
    require_space,
    tensor_bytes,
    with_checksum,
    write_whole,
)
from deme_cli.jobs import claim
from deme_cli.model_spec import DIGEST, model_spec
from deme_cli.timesteps import TimestepRange

if TYPE_CHECKING:
    import torch

VERSION = 1
EXPORTED = "deme_record"  # in the metadata of an export: the record of what it was made of
FORMAT = "pt"  # by which other readers of safetensors know the layout of weights
_CHUNK_BYTES = 1 << 22
_WRITEBACK_BYTES = 1 << 23
_THREADED_BYTES = 1 << 18  # below this, handing bytes to a thread costs more than hashing them
_DenoiserKind = Literal["base", "expert", "task-vector", "merged"]
_Written = TypeVar("_Written", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every artifact says of itself. `fingerprint` is set by the writer."""

    kind: ClassVar[str] = ""
    fingerprint: str = ""
    created_by: str = f"deme {__version__}"

    def to_json(self) -> str:
        return with_checksum(json.dumps({"kind": self.kind, "version": VERSION, **asdict(self)}))


@dataclass(frozen=True, kw_only=True)
class DenoiserRecord(Record):
    """Any artifact whose tensors are a denoiser's, or differences of them.

    `model_config` is the diffusers config (with `_class_name`), `scheduler_config` likewise.
    `companions` holds the SHA-256 of each frozen part of the pipeline around the denoiser (VAE,
    text encoders, tokenizers), by its name; empty for models that draw pixels from noise alone.
    `single_file` is the path and the SHA-256 of the one that the base came from, if it did.
    """

    source: str
    model_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    num_train_timesteps: int
    companions: dict[str, Any] = field(default_factory=dict)
    single_file: dict[str, Any] | None = None

    @property
    def origin(self) -> str:
        """What the base was imported from; `source` is where its frozen parts are."""
        return str(self.single_file["path"]) if self.single_file else self.source


@dataclass(frozen=True, kw_only=True)
class BaseRecord(DenoiserRecord):
    """The starting point. `training` holds the settings where deme trained it from scratch."""

    kind: ClassVar[str] = "base"
    training: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertRecord(DenoiserRecord):
    """A denoiser finetuned on one range. `base` is the fingerprint of what it started from.

    `projection` is `block`, `fold` or `none`; an expert trained with `fold` is already folded.
    `training` holds every setting; `data` names the images and their fingerprint. Of one that was
    trained elsewhere nothing is known of these, and `imported` tells what it was made of. `holds`:
    `all` of the denoiser, or `adapter`: low-rank factors alone, with their {rank, alpha, targets}.
    """

    kind: ClassVar[str] = "expert"
    range: list[int]
    index: int | None = None
    of: int | None = None
    base: str
    p: float | None = None
    steps: int | None = None
    seed: int | None = None
    projection: str = "none"
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    imported: dict[str, Any] | None = None
    holds: str = "all"
    adapter: dict[str, Any] | None = None

    @property
    def timesteps(self) -> TimestepRange:
        return TimestepRange(*self.range)

    @property
    def label(self) -> str:
        return f"{self.index}of{self.of}" if self.of else f"{self.range[0]}-{self.range[1]}"


@dataclass(frozen=True, kw_only=True)
class TaskVectorRecord(ExpertRecord):
    """tau_i = theta_i - theta. `expert` is the fingerprint of theta_i; `norms` are L2 norms:
    `total`, `relative` (to the base), and one per top-level block."""

    kind: ClassVar[str] = "task-vector"
    expert: str
    norms: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MergedRecord(DenoiserRecord):
    """theta + sum_i w_i tau_i. `parents` are {path, kind, fingerprint, range} in the order of
    `coefficients`; `coefficients_for` holds others for the tensors that a glob matches, the first
    glob that does. `method` says what became of the tau_i before, and `settings` with which
    settings. `search` is None for given coefficients; `report` is what was measured afterwards.
    `holds`: `all`, or `adapter`: one LoRA of {rank}, which has the share {kept} of the sum."""

    kind: ClassVar[str] = "merged"
    base: str
    parents: list[dict[str, Any]]
    coefficients: list[float]
    method: str
    projection: str
    coefficients_for: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    holds: str = "all"
    adapter: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class SamplesRecord(Record):
    """Images. `protocol` is the card: how, by which model, from which seed they were drawn.

    `prompts` and `classes`, where there are any, hold one entry per image."""

    kind: ClassVar[str] = "samples"
    protocol: dict[str, Any]
    prompts: list[str] | None = None
    classes: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class StatisticsRecord(Record):
    """Mean and covariance of features. `extractor` is {name, sha256}; `resize` the resize mode."""

    kind: ClassVar[str] = "statistics"
    n: int
    extractor: dict[str, Any]
    resize: str
    source: str
    data: dict[str, Any] = field(default_factory=dict)


KINDS: dict[str, type[Record]] = {
    "base": BaseRecord, "expert": ExpertRecord, "task-vector": TaskVectorRecord,
    "merged": MergedRecord, "samples": SamplesRecord, "statistics": StatisticsRecord,
}  # fmt: skip


def parse_record(text: str, where: str) -> Record:
    """The record that a header's `deme` string holds. Raises ArtifactError naming what is wrong."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: the deme record is not valid JSON ({error})") from error
    found = document.get("kind") if isinstance(document, dict) else document
    if not isinstance(document, dict) or not isinstance(found, str) or found not in KINDS:
        raise ArtifactError(
            f"{where}: unknown kind of artifact {shown(found)}; known: {', '.join(KINDS)}"
        )
    if document.get("version") != VERSION:
        raise ArtifactError(
            f"{where}: record version {shown(document.get('version'))}, this deme reads {VERSION}; "
            f"update deme or write the file again"
        )
    kind, values = KINDS[found], {}
    for declared in fields(kind):
        name = declared.name
        if name in document:
            values[name] = document[name]
            if not _fits(values[name], str(declared.type)):
                raise ArtifactError(
                    f"{where}: {name!r} in the record should be {declared.type}, found "
                    f"{shown(values[name])}"
                )
        elif declared.default is MISSING and declared.default_factory is MISSING:
            raise ArtifactError(f"{where}: the {found} record lacks {name!r}")
    span, total = values.get("range"), values.get("num_train_timesteps", 0)
    if span is not None and not (len(span) == 2 and 0 <= span[0] < span[1] <= total):
        raise ArtifactError(
            f"{where}: 'range' in the record should be [start, stop] within 0:{total}, found {span}"
        )
    require_intact(text, where, has_checksum="digest" in document)
    return kind(**values)


def _fits(value: Any, declared: str) -> bool:
    """Whether a JSON value is of a declared type, as `list[int] | None`; of tables no more."""
    for option in declared.split(" | "):
        name, _, entry = option.removesuffix("]").partition("[")
        names = {"float": ("int", "float"), "None": ("NoneType",)}.get(name, (name,))
        if type(value).__name__ in names:  # no bool passes for an int
            return name != "list" or all(_fits(each, entry) for each in value)
    return False


def record_of(header: Header, *kinds: str) -> Any:
    """The typed record in a header, checked to be one of `kinds` (any if none is given).

    Raises ArtifactError if deme did not write the file, or another kind.
    """
    if "deme" not in header.metadata:
        is_export = EXPORTED in header.metadata
        raise ArtifactError(foreign_message(header.path, header.tensors, is_export=is_export))
    if (found := header.metadata.get("format")) != FORMAT:
        raise ArtifactError(
            f"{header.path}: its metadata should have format {FORMAT!r}, found {found!r}; the file "
            f"was altered or damaged, make it again"
        )
    record = parse_record(header.metadata["deme"], str(header.path))
    if kinds and record.kind not in kinds:
        expected = " or ".join(repr(kind) for kind in kinds)
        raise ArtifactError(
            f"{header.path}: expected an artifact of kind {expected}, found {record.kind!r}"
        )
    return record


@overload
def read_record(path: Path, kind: Literal["base"], /) -> BaseRecord: ...
@overload
def read_record(path: Path, kind: Literal["expert"], /) -> ExpertRecord: ...
@overload
def read_record(path: Path, kind: Literal["merged"], /) -> MergedRecord: ...
@overload
def read_record(path: Path, kind: Literal["samples"], /) -> SamplesRecord: ...
@overload
def read_record(path: Path, kind: _DenoiserKind, /, *others: _DenoiserKind) -> DenoiserRecord: ...
@overload
def read_record(path: Path, *kinds: str) -> Record: ...
def read_record(path: Path, *kinds: str) -> Record:
    """The record of the artifact at `path`; see `record_of`."""
    record: Record = record_of(read_header(path), *kinds)
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
    total, by_name = hashlib.sha256(), {spec.name: spec for spec in digests}
    for name, spec in sorted(by_name.items()):
        total.update(f"{name}\0{spec.dtype}\0{list(spec.shape)}\0{digests[spec]}\n".encode())
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
            digest, left = hashlib.sha256(), spec.num_bytes
            file.seek(spec.begin)
            while piece := file.read(min(left, _CHUNK_BYTES)):
                digest.update(piece)
                left -= len(piece)
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
        self._digests: dict[TensorSpec, str] = {}
        self._current = hashlib.sha256()
        self._filled = self._handed_over = 0

    def __enter__(self) -> ArtifactWriter[_Written]:
        from concurrent.futures import ThreadPoolExecutor

        require_space(self.path, sum(spec.num_bytes for spec in self.layout))
        self._partial = self.path.parent / f".{self.path.name}.partial"
        with ExitStack() as undo:
            undo.enter_context(claim(self.path))
            undo.callback(self._partial.unlink, missing_ok=True)
            self._hasher = undo.enter_context(ThreadPoolExecutor(1, "deme-hash"))
            with writing(self.path):
                self._file = undo.enter_context(self._partial.open("wb", buffering=0))
            self._put(memoryview(self._header()))
            self._undo = undo.pop_all()
        self._hash(memoryview(b""))  # of tensors without elements, that come first
        return self

    def write(self, data: Any) -> None:
        """Append bytes of the next tensors of the layout; `data` is free again on return."""
        view = memoryview(data).cast("B")
        is_large = len(view) >= _THREADED_BYTES
        hashing = self._hasher.submit(self._hash, view) if is_large else None
        try:
            self._put(view)
        finally:
            hashing.result() if hashing else self._hash(view)
        # Have the kernel put what is written on the disk already, for a short sync at the end.
        # DONTNEED starts that without waiting; only bytes the disk has leave the cache.
        end = self._file.tell()
        if end - self._handed_over >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            begin, self._handed_over = self._handed_over, end
            os.posix_fadvise(self._file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _put(self, view: memoryview) -> None:
        """Write all bytes: on a disk that is nearly full, the system takes some of them."""
        with writing(self.path):
            while len(view):
                view = view[self._file.write(view) :]

    def _hash(self, view: memoryview) -> None:
        """Add bytes to the digest of the tensor they belong to, and close those that are whole."""
        while len(self._digests) < len(self.layout):
            spec = self.layout[len(self._digests)]
            taken = view[: spec.num_bytes - self._filled]
            self._current.update(taken)
            self._filled, view = self._filled + len(taken), view[len(taken) :]
            if self._filled < spec.num_bytes:
                break
            self._digests[spec] = self._current.hexdigest()
            self._current, self._filled = hashlib.sha256(), 0

    def __exit__(self, failure: object, *about: object) -> None:
        with self._undo:
            if failure is not None:
                return
            assert len(self._digests) == len(self.layout), "the artifact lacks tensors"
            self.record = replace(self.record, fingerprint=combine_digests(self._digests))
            self._file.seek(0)
            self._put(memoryview(self._header()))
            with writing(self.path):
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._partial, self.path)

    def _header(self) -> bytes:
        record = replace(self.record, fingerprint=self.record.fingerprint or "0" * 64)
        metadata = {"format": FORMAT, "deme": record.to_json()}
        if isinstance(record, MergedRecord):
            metadata |= model_spec(record)
        return header_bytes(self.layout, metadata)


def header_bytes(layout: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors of a safetensors file, which lie in the order of `layout`."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in layout:
        begin, end = end, end + spec.num_bytes
        document[spec.name] = {
            "dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def add_metadata(path: Path, told: Mapping[str, str]) -> None:
    """Put entries into the metadata of a safetensors file; its tensors stay where they are."""
    header = read_header(path)
    layout = sorted(header.tensors.values(), key=lambda spec: spec.begin)

    def tensors() -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(layout[0].begin)
            yield from iter(lambda: file.read(_CHUNK_BYTES), b"")

    write_whole(path, chain([header_bytes(layout, {**header.metadata, **told})], tensors()))


def export_metadata(record: DenoiserRecord, told: Mapping[str, str], digest: str) -> dict[str, str]:
    """The metadata of an export of one file; told: its own.   digest: SHA-256 of its tensors."""
    return {**told, "format": FORMAT, EXPORTED: record.to_json(), DIGEST: f"0x{digest}"}


def write_artifact(path: Path, tensors: Mapping[str, Any], record: _Written) -> _Written:
    """Write torch or numpy tensors as one artifact; returns the record with its fingerprint."""
    layout = layout_of(tensors)
    with ArtifactWriter(path, layout, record) as writer:
        for spec in layout:
            writer.write(tensor_bytes(tensors[spec.name]))
    return writer.record
