"""Safetensors files seen from outside: header, shapes, bytes. Trusts nothing, needs no torch.

Lengths, offsets and shapes are checked against the file before a tensor is touched.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import foreign_files
from deme_cli.errors import ArtifactError, MissingError, reading
from deme_cli.seal import require_intact

if TYPE_CHECKING:
    import numpy as np
    import torch

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # what numpy and torch can hold; keeps the product of a shape cheap
MAX_INTEGER = 1 << 63  # no file is that long
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

    Takes memory of the order of the header, which is never longer than the file, and no tensor.
    Raises MissingError if there is no such file, ArtifactError if it is not whole and valid, or
    the record that deme wrote into it was altered.
    """
    path = Path(path)
    text, size = _header_text(path)
    document = _parse_header(path, text)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{path}: the header's __metadata__ is not a table of strings")
    if "deme" in metadata:
        require_intact(metadata["deme"], str(path))
    start = 8 + len(text)
    specs = [_parse_spec(path, name, entry, start) for name, entry in document.items()]
    position = start
    for spec in sorted(specs, key=lambda s: (s.begin, s.end)):
        if spec.begin != position:
            raise ArtifactError(
                f"{path}: tensor {_shown(spec.name)} does not follow the one before it"
            )
        position = spec.end
    if position != size:
        raise ArtifactError(
            f"{path}: truncated or padded: expected {position} bytes, found {size}; "
            f"copy or make the file again"
        )
    return Header(path, {spec.name: spec for spec in specs}, metadata)


def _header_text(path: Path) -> tuple[bytes, int]:
    """The bytes between the header's length and the tensors, and the size of the file.

    A pipe or a device, which may never end, is not opened.
    """
    try:
        with reading(path):
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                raise ArtifactError(f"{path}: expected a safetensors file, found a folder")
            if not stat.S_ISREG(status.st_mode):
                what = "a pipe or a device"
                raise ArtifactError(f"{path}: expected a safetensors file, found {what}")
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
                if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                    if names := foreign_files.pickled_names(path):
                        raise ArtifactError(foreign_files.told(path, names))
                    raise ArtifactError(
                        f"{path}: not a whole safetensors file ({size} bytes, a header of {length})"
                    )
                return file.read(length), size
    except ValueError as error:  # a zero byte in the name
        raise MissingError(f"{str(path)!r}: no such file") from error


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    """The JSON table of a header, in which every name stands once."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ArtifactError(f"{path}: the header has the same name twice")
        return table

    try:
        document = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a safetensors file (its header is not JSON)") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{path}: not a safetensors file (its header is not a table)")
    return document


def _shown(name: str) -> str:
    """A name from outside as a message shows it, on one line of bounded length."""
    return f"{name!r:.80}"


def _parse_spec(path: Path, name: str, entry: Any, start: int) -> TensorSpec:
    try:
        name.encode()
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        spec = TensorSpec(name, dtype, tuple(shape), start + begin, start + end)
        sound = (
            isinstance(shape, list)
            and len(shape) <= MAX_DIMENSIONS
            and all(type(n) is int and 0 <= n < MAX_INTEGER for n in (*shape, begin, end))
            and spec.end - spec.begin == spec.num_bytes
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: tensor {_shown(name)} is described wrongly in the header"
        ) from error
    if not sound:
        raise ArtifactError(f"{path}: shape and bytes of tensor {_shown(name)} disagree")
    return spec


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
    import numpy as np

    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


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
