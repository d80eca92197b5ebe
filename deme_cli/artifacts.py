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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from deme_cli.errors import ArtifactError, ConfigError, MissingError, writing
from deme_cli.records import Record, parse_record

if TYPE_CHECKING:
    import numpy as np
    import torch

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
    "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_DTYPE_CODES = {
    "float64": "F64", "int64": "I64", "uint64": "U64", "float32": "F32", "int32": "I32",
    "uint32": "U32", "float16": "F16", "bfloat16": "BF16", "int16": "I16", "uint16": "U16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_CHUNK_BYTES = 1 << 22
_THREADED_BYTES = 1 << 18  # below this, handing a piece to a thread costs more than hashing it


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, safetensors dtype code, shape, and bytes `begin:end` in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its tensors. `tensors` by name, offsets in the file."""

    path: Path
    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]

    @property
    def num_parameters(self) -> int:
        return sum(spec.num_elements for spec in self.tensors.values())


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file.

    Raises MissingError if there is no such file, ArtifactError if it is not whole and valid.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ArtifactError(
                    f"{path}: not a whole safetensors file ({size} bytes, a header of {length})"
                )
            document = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ArtifactError(f"{path}: expected a safetensors file, found a folder") from error
    except PermissionError as error:
        raise MissingError(f"{path}: no permission to read it") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a safetensors file (its header is not JSON)") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{path}: not a safetensors file (its header is not a table)")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{path}: the header's __metadata__ is not a table of strings")
    start = 8 + length
    specs = [_parse_spec(path, name, entry, start) for name, entry in document.items()]
    position = start
    for spec in sorted(specs, key=lambda s: (s.begin, s.end)):
        if spec.begin != position:
            raise ArtifactError(f"{path}: tensor {spec.name!r} does not follow the one before it")
        position = spec.end
    if position != size:
        raise ArtifactError(
            f"{path}: truncated or padded: expected {position} bytes, found {size}; "
            f"copy or make the file again"
        )
    return Header(path, {spec.name: spec for spec in specs}, metadata)


def _parse_spec(path: Path, name: str, entry: Any, start: int) -> TensorSpec:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        spec = TensorSpec(name, dtype, tuple(shape), start + begin, start + end)
        sound = (
            all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            and spec.end - spec.begin == spec.num_bytes
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: tensor {name!r} is described wrongly in the header"
        ) from error
    if not sound:
        raise ArtifactError(f"{path}: shape and bytes of tensor {name!r} disagree in the header")
    return spec


def record_of(header: Header) -> Record:
    """The typed record in a header. Raises ArtifactError if deme did not write the file."""
    if "deme" not in header.metadata:
        raise ArtifactError(
            f"{header.path} was not written by deme; import a model with `deme split`"
        )
    return parse_record(header.metadata["deme"], str(header.path))


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
    from safetensors.torch import load_file

    read_header(path)
    return load_file(path)


def layout_of(tensors: Mapping[str, Any]) -> list[TensorSpec]:
    """Specs of torch or numpy tensors, largest element first so that every tensor is aligned."""
    specs = []
    for name, tensor in tensors.items():
        code = _DTYPE_CODES.get(str(tensor.dtype).removeprefix("torch."))
        if code is None:
            raise ArtifactError(f"tensor {name!r} has dtype {tensor.dtype}, which cannot be stored")
        specs.append(TensorSpec(name, code, tuple(tensor.shape)))
    return sorted(specs, key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name))


def tensor_bytes(tensor: torch.Tensor | np.ndarray) -> memoryview:
    """The little-endian bytes of a tensor, without a copy where it is contiguous on the CPU."""
    if hasattr(tensor, "detach"):
        import torch

        array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        import numpy as np

        array = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    return memoryview(array)


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


def read_pieces(file: Any, spec: TensorSpec, num_bytes: int = _CHUNK_BYTES) -> Iterator[memoryview]:
    """The bytes of one tensor in pieces of at most `num_bytes`, each valid until the next."""
    buffer = memoryview(bytearray(min(num_bytes, max(spec.num_bytes, 1))))
    file.seek(spec.begin)
    left = spec.end - spec.begin
    while left:
        count = file.readinto(buffer[: min(left, len(buffer))])
        if not count:
            raise ArtifactError(f"{file.name}: ended while tensor {spec.name!r} was read")
        yield buffer[:count]
        left -= count


def require_output(path: Path, *, force: bool) -> None:
    """Check that `path` may be written: absent or `force`, in a folder that takes files."""
    path = Path(path)
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; add --force to replace it, or choose another --output")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f".{path.name}.{os.getpid()}.probe"
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


def require_space(path: Path, num_bytes: int) -> None:
    """Check that the disk of `path` has room for `num_bytes`; raises MissingError if not."""
    import shutil

    folder = Path(path).resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MissingError(
            f"{path}: needs {num_bytes / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free; "
            f"free some space or choose another --output"
        )


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold the right to write `path`. Raises ConfigError while another process holds it."""
    from filelock import FileLock, Timeout

    path = Path(path)
    lock_path = path.parent / f".{path.name}.lock"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{path} is being written by another deme process; wait for it or use --output"
            ) from error
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        lock.release()


class ArtifactWriter:
    """Write one artifact in the order of its layout; it appears whole on exit, or not at all.

    with ArtifactWriter(path, layout, record) as writer:
        for spec in layout: writer.write(bytes of spec)   # in any number of pieces
    writer.record                                          # carries the fingerprint

    Large pieces are hashed on a second thread while the first hands them to the file.
    """

    def __init__(self, path: Path, layout: Sequence[TensorSpec], record: Record) -> None:
        self.path, self.layout, self.record = Path(path), list(layout), record
        self._partial = self.path.parent / f".{self.path.name}.partial"
        self._digests: dict[TensorSpec, str] = {}
        self._current = hashlib.sha256()
        self._filled = 0
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deme-hash")

    def __enter__(self) -> ArtifactWriter:
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
        document = {"__metadata__": {"format": "pt", "deme": record.to_json()}, **entries}
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def write_artifact(path: Path, tensors: Mapping[str, Any], record: Record) -> Record:
    """Write torch or numpy tensors as one artifact; returns the record with its fingerprint."""
    layout = layout_of(tensors)
    with ArtifactWriter(path, layout, record) as writer:
        for spec in layout:
            writer.write(tensor_bytes(tensors[spec.name]))
    return writer.record


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a plain file (PNG, TOML, JSON) so that it appears whole or not at all."""
    path = Path(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
