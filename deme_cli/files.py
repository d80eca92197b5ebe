"""Files: places for outputs, safetensors files seen from outside, and what foreign weights are.

A place is checked before work and filled whole or not at all. A reader trusts nothing: lengths,
offsets and shapes are checked against the file before a tensor is touched. Nothing is unpickled:
of a pickle the words in it are listed. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import re
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.errors import ArtifactError, ConfigError, MissingError, reading, writing

if TYPE_CHECKING:
    import numpy as np
    import torch


def require_output(path: Path, *, force: bool) -> None:
    """Check that `path` may be written: absent or `force`, in a folder that takes files."""
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file with --output")
        if path.exists() and not force:
            raise ConfigError(
                f"{path} exists; add --force to replace it, or choose another --output"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f".{path.name}.{os.getpid()}.probe"
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


def require_space(path: Path, num_bytes: int) -> None:
    """Check that the disk of `path` has room for `num_bytes`; raises MissingError if not."""
    import shutil

    folder = Path(os.path.realpath(path)).parent  # unlike `resolve`, content with a link to itself
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MissingError(
            f"{path}: needs {num_bytes / 1e6:,.2f} MB, the disk has {free / 1e6:,.2f} MB free; "
            f"free some space or choose another --output"
        )


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


def shown_path(path: Path) -> Path:
    """As seen from the current folder, where it lies below."""
    here, path = Path.cwd(), Path(path)
    return path.relative_to(here) if path.is_relative_to(here) else path


_BEFORE, _AFTER = ', "digest": "', '"}'
_LENGTH = len(_BEFORE) + 64 + len(_AFTER)


def with_checksum(text: str) -> str:
    """A JSON table with the digest as its last entry."""
    return text[:-1] + _checksum_entry(text)


def require_intact(text: str, where: str, *, has_checksum: bool = False) -> None:
    """Check the checksum of `text`; raises ArtifactError if they disagree.

    has_checksum: known to have one; otherwise a text without anything like a entry is left alone.
    """
    body, entry = text[:-_LENGTH] + "}", text[-_LENGTH:]
    if (has_checksum or _resembles_a_checksum(entry)) and entry != _checksum_entry(body):
        raise ArtifactError(
            f"{where}: the record in the header was altered or damaged (its digest is another); "
            f"copy or make the file again"
        )


def _checksum_entry(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{_BEFORE}{digest}{_AFTER}"


def _resembles_a_checksum(entry: str) -> bool:
    """Whether most of what frames a digest is there: a flipped bit may have changed the rest."""
    frame = entry[: len(_BEFORE)] + entry[-len(_AFTER) :]
    expected = _BEFORE + _AFTER
    return len(entry) == _LENGTH and sum(map(str.__eq__, frame, expected)) > len(expected) // 2


_PICKLED_BYTES = 1 << 24  # read of a pickle that is no zip: its names come before its numbers
_WHOLE = "convert it with diffusers ({}.from_single_file(FILE).save_pretrained(DIR)) and give DIR"
_NETWORK = (
    "convert it with diffusers ({}.from_single_file(FILE).save_pretrained(DIR/transformer), DIR "
    "the folder of its pipeline) and give DIR"
)
_FUSE = (
    "fuse it in diffusers (pipeline.load_lora_weights(FILE); pipeline.fuse_lora(); "
    "pipeline.unload_lora_weights(); pipeline.save_pretrained(DIR)) and give DIR"
)
_FOLDER = "give the folder that holds them beside config.json"
_ANOTHER = "deme takes the networks of diffusers pipelines alone"
# What is part of some tensor's name, what then the file is, what to do. The first that fits.
_KINDS = (
    (r"\blora_|_lora\b|\.lora\b|hada_w|lokr_w|oft_blocks", "a LoRA, not a whole model", _FUSE),
    (r"control_model\.|controlnet_", "a ControlNet", _ANOTHER),
    (r"ip_adapter\.|image_proj\.", "an IP-Adapter", _ANOTHER),
    (r"motion_modules\.", "motion modules of AnimateDiff", _ANOTHER),
    (r"emb_params|string_to_param", "a textual inversion", _ANOTHER),
    (r"joint_blocks\.", "a single-file checkpoint of Stable Diffusion 3",
     _NETWORK.format("SD3Transformer2DModel")),
    (r"double_blocks\.", "a single-file checkpoint of Flux",
     _NETWORK.format("FluxTransformer2DModel")),
    (r"blocks\.\d+\.self_attn\.norm_q\.", "a single-file checkpoint of Wan",
     _NETWORK.format("WanTransformer3DModel")),
    (r"conditioner\.embedders\.1\.", "a single-file checkpoint of SDXL",
     _WHOLE.format("StableDiffusionXLPipeline")),
    (r"conditioner\.embedders\.0\.model\.", "the SDXL refiner", "deme takes SDXL's base alone"),
    (r"diffusion_model\.(input|output)_blocks\.", "a single-file checkpoint of Stable Diffusion",
     _WHOLE.format("StableDiffusionPipeline")),
    (r"\bmodel\.diffusion_model\.", "a single-file checkpoint of another network", _ANOTHER),
    (r"\bfinal_layer\.adaLN|\by_embedder\.", "a DiT in its authors' format",
     "give its diffusers folder or hub id, as facebook/DiT-XL-2-256"),
    (r"\bencoder\.conv_in\.|\bquant_conv\.", "a VAE alone", _ANOTHER),
    (r"\btext_model\.|\bshared\.weight", "a text encoder alone", _ANOTHER),
    (r"\bdown_blocks\.|transformer_blocks\.|\bcondition_embedder\.",
     "the weights of a diffusers network alone", _FOLDER),
)  # fmt: skip


def foreign_message(path: Path, names: Iterable[str]) -> str:
    """The message that refuses a file with tensors of these names."""
    text = "\n".join(names)
    found = next(((what, todo) for part, what, todo in _KINDS if re.search(part, text)), None)
    if found is None:
        return (
            f"{path}: not written by deme, and no model that it knows; a model is an artifact, a "
            f"hub id, or a diffusers folder: weights alone do not tell their network, "
            f"{_FOLDER}"
        )
    return f"{path}: {found[0]}, not written by deme; {found[1]}"


def pickled_names(path: Path) -> list[str]:
    """The words in a pickle or in a zip of one, tensors' names among them; [] of another file."""
    with path.open("rb") as file:
        head = file.read(4)
        if head[:2] == b"\x80\x02":
            pickles = io.BytesIO(head + file.read(_PICKLED_BYTES))
        elif head == b"PK\x03\x04" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
                pickles = io.BytesIO(archive.read(member) if member else b"")
        else:
            return []
    words = []
    with suppress(ValueError, IndexError):  # it ends, or what follows are numbers
        while True:  # torch's old files are several pickles, one behind the other
            for _, arg, _ in pickletools.genops(pickles):
                if isinstance(arg, str):
                    words.append(arg)
    return words


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
                    if names := pickled_names(path):
                        raise ArtifactError(foreign_message(path, names))
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
