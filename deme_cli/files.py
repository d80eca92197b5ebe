"""Files: places for outputs, safetensors files seen from outside, and what foreign weights are.

A place is checked before work and filled whole or not at all. A reader trusts nothing: the library
checks lengths, names, offsets and shapes against the file before a tensor is touched. Nothing is
unpickled: of a pickle the words in it are listed. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.console import size_of
from deme_cli.errors import ArtifactError, ConfigError, MissingError, reading, shown, writing

if TYPE_CHECKING:
    import numpy as np
    import torch


def require_output(path: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Check that `path` may be written: absent or `force`, in a folder that takes files, and none
    of the `inputs` that it is to be made of."""
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file with --output")
        if path.exists() and not force:
            raise ConfigError(
                f"{path} exists; add --force to replace it, or choose another --output"
            )
        if path.exists() and any(one.exists() and one.samefile(path) for one in inputs):
            raise ConfigError(
                f"{path} is read, so it cannot be written as well; choose another --output"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f".{path.name}.{os.getpid()}.probe"
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


def require_space(path: Path, num_bytes: int) -> None:
    """Check that the disk of `path` has room for `num_bytes`; raises MissingError if not."""
    folder = Path(os.path.realpath(path)).parent  # unlike `resolve`, content with a link to itself
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MissingError(
            f"{path}: needs {size_of(num_bytes)}, {size_of(num_bytes - free)} more than the disk "
            f"has free; free some space or choose another --output"
        )


def write_whole(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write a plain file (PNG, TOML, JSON) so that it appears whole or not at all."""
    path = Path(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    content = content.encode() if isinstance(content, str) else content
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                for part in [content] if isinstance(content, bytes) else content:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside `folder` that takes its place if the body ends well, else goes."""
    partial, replaced = (
        folder.parent / f".{folder.name}.{os.getpid()}.{what}" for what in ("partial", "replaced")
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        yield partial
        for path in filter(Path.is_file, partial.rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if force and folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def shown_path(path: Path) -> Path:
    """As seen from the current folder, where it lies below."""
    here, path = Path.cwd(), Path(path)
    return path.relative_to(here) if path.is_relative_to(here) else path


_BEFORE, _AFTER = ', "digest": "', '"}'
_LENGTH = len(_BEFORE) + 64 + len(_AFTER)


def with_checksum(text: str) -> str:
    """A JSON table with the SHA-256 of its text as its last entry."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{text[:-1]}{_BEFORE}{digest}{_AFTER}"


def require_intact(text: str, where: str, *, has_checksum: bool = False) -> None:
    """Check the checksum of a record; raises ArtifactError if it is not that of the text.

    has_checksum: known to have one; otherwise a text is left alone that has less than half of what
    frames one, as those of before there were any: a flipped bit may be in the frame.
    """
    entry = text[-_LENGTH:]
    frame = entry[: len(_BEFORE)] + entry[-len(_AFTER) :]
    half = len(_BEFORE + _AFTER) // 2
    if len(entry) == _LENGTH and sum(map(str.__eq__, frame, _BEFORE + _AFTER)) > half:
        has_checksum = True
    if has_checksum and text != with_checksum(text[:-_LENGTH] + "}"):
        raise ArtifactError(
            f"{where}: the record in the header was altered or damaged (its digest is another); "
            f"copy or make the file again"
        )


DTYPES = {  # of safetensors: bytes of an element, and what numpy and torch call it
    "F64": (8, "float64"), "I64": (8, "int64"), "U64": (8, "uint64"), "F32": (4, "float32"),
    "I32": (4, "int32"), "U32": (4, "uint32"), "F16": (2, "float16"), "BF16": (2, "bfloat16"),
    "I16": (2, "int16"), "U16": (2, "uint16"), "I8": (1, "int8"), "U8": (1, "uint8"),
    "BOOL": (1, "bool"), "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"),
}  # fmt: skip
DTYPE_BYTES = {code: num_bytes for code, (num_bytes, _) in DTYPES.items()}


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
        return math.prod(self.shape)

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
    """The header of a safetensors file, checked against the file by the library.

    Takes memory of the order of the header, and no tensor. Raises MissingError if there is no such
    file, ArtifactError if it is not whole and valid. A pipe or a device is not opened: it may never
    end.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with reading(path):
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):
                what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
                raise ArtifactError(f"{path}: expected a safetensors file, found {what}")
            with safe_open(path, "np"):
                pass
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                document = json.loads(file.read(length), object_pairs_hook=_each_once)
    except SafetensorError as error:
        if names := pickled_names(path):
            hint = "" if path.suffix in PICKLED else "; it is a pickle: end its name in .bin first"
            raise ArtifactError(foreign_message(path, names) + hint) from error
        with path.open("rb") as file:
            if re.match(rb"\x80[\x02-\x05]", file.read(2)):
                raise ArtifactError(
                    f"{path}: a pickle, but not of weights that torch saved; give a .safetensors"
                ) from error
        raise ArtifactError(
            f"{path}: not a whole safetensors file ({shown(str(error))}); copy or make it again"
        ) from error
    except LookupError as error:
        raise ArtifactError(f"{path}: the header has the same name twice") from error
    except ValueError as error:  # a zero byte in the name
        raise MissingError(f"{str(path)!r}: no such file") from error
    metadata = document.pop("__metadata__", None) or {}
    if "deme" in metadata:
        require_intact(metadata["deme"], str(path))
    specs = {}
    for name, entry in document.items():
        if entry["dtype"] not in DTYPES:
            raise ArtifactError(f"{path}: tensor {shown(name)} has the dtype {entry['dtype']}")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        specs[name] = TensorSpec(name, entry["dtype"], tuple(entry["shape"]), begin, end)
    return Header(path, specs, metadata)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON table in which every name stands once; the library takes the last of several."""
    if len(table := dict(pairs)) < len(pairs):
        raise LookupError
    return table


def layout_of(tensors: Mapping[str, Any]) -> list[TensorSpec]:
    """Specs of torch or numpy tensors, largest element first so that every tensor is aligned."""
    codes, specs = {name: code for code, (_, name) in DTYPES.items()}, []
    for name, tensor in tensors.items():
        code = codes.get(str(tensor.dtype).removeprefix("torch."))
        if code is None:
            raise ArtifactError(f"tensor {name!r} has dtype {tensor.dtype}, which cannot be stored")
        specs.append(TensorSpec(name, code, tuple(tensor.shape)))
    return sorted(specs, key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name))


SAVE_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def cast_specs(specs: Iterable[TensorSpec], save_dtype: str | None) -> list[TensorSpec]:
    """`specs` with their floating-point tensors in a dtype of SAVE_DTYPES; None for as they are.

    Raises ConfigError for another name.
    """
    if save_dtype is None:
        return list(specs)
    if save_dtype not in SAVE_DTYPES:
        raise ConfigError(f"save_dtype {save_dtype!r}: expected {', '.join(SAVE_DTYPES)}")
    floats, code = ("F64", *SAVE_DTYPES.values()), SAVE_DTYPES[save_dtype]
    return [
        TensorSpec(spec.name, code if spec.dtype in floats else spec.dtype, spec.shape)
        for spec in specs
    ]


def tensor_bytes(tensor: torch.Tensor | np.ndarray) -> memoryview:
    """The little-endian bytes of a tensor, without a copy where it is contiguous on the CPU."""
    import numpy as np

    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_PICKLED_BYTES = 1 << 24  # read of a pickle that is no zip: its names come before its numbers
_SPLIT = "`deme split FILE` starts from one in a .safetensors file (convert a pickle first)"
_FUSE = "fuse it where it was trained, and import the whole network"
_EXPERT = "as an expert: deme import FILE --base BASE --range START:STOP"
_FOLDER = f"give the folder that holds them beside config.json, or take them {_EXPERT}"
_UNKNOWN = (
    "a model is an artifact, a hub id, or a diffusers folder: weights alone do not tell their "
    f"network, {_FOLDER}"
)
_ANOTHER = "deme takes the networks of diffusers pipelines alone"
# What is part of some tensor's name, what then the file is, what to do. The first that fits.
_KINDS = (
    (r"\b(hada|lokr|oft|ia3)_", "an adapter (LoHa, LoKr, OFT, IA3), not a whole model", _FUSE),
    (r"\blora_|_lora\b|\.lora\b", "a LoRA, not a whole model", f"take it {_EXPERT}"),
    (r"\bbase_model\.model\.", "an adapter of PEFT, not a whole model", _FUSE),
    (r"control_model\.|controlnet_", "a ControlNet", _ANOTHER),
    (r"ip_adapter\.|image_proj\.", "an IP-Adapter", _ANOTHER),
    (r"motion_modules\.", "motion modules of AnimateDiff", _ANOTHER),
    (r"emb_params|string_to_param", "a textual inversion", _ANOTHER),
    (r"joint_blocks\.", "a single-file checkpoint of Stable Diffusion 3", _SPLIT),
    (r"double_blocks\.", "a single-file checkpoint of Flux", _SPLIT),
    (r"blocks\.\d+\.self_attn\.norm_q\.", "a single-file checkpoint of Wan", _SPLIT),
    (r"conditioner\.embedders\.1\.", "a single-file checkpoint of SDXL", _SPLIT),
    (r"conditioner\.embedders\.0\.model\.", "the SDXL refiner", "deme takes SDXL's base alone"),
    (r"\b(input|output)_blocks\.", "a single-file checkpoint of Stable Diffusion", _SPLIT),
    (r"\bmodel\.diffusion_model\.", "a single-file checkpoint of another network", _ANOTHER),
    (r"\bfinal_layer\.adaLN|\by_embedder\.", "a DiT in its authors' format",
     "give its diffusers folder or hub id, as facebook/DiT-XL-2-256"),
    (r"\bencoder\.conv_in\.|\bquant_conv\.", "a VAE alone", _ANOTHER),
    (r"\btext_model\.|\bshared\.weight", "a text encoder alone", _ANOTHER),
    (r"\badd_embedding\.", "the weights of a UNet2DConditionModel alone (SDXL)", _FOLDER),
    (r"\bdown_blocks\..*attn2\.", "the weights of a UNet2DConditionModel alone", _FOLDER),
    (r"\bdown_blocks\.", "the weights of a UNet2DModel alone", _FOLDER),
    (r"single_transformer_blocks\.", "the weights of a FluxTransformer2DModel alone", _FOLDER),
    (r"transformer_blocks\..*attn\.add_q_proj",
     "the weights of an SD3Transformer2DModel alone", _FOLDER),
    (r"\btransformer_blocks\.", "the weights of a DiTTransformer2DModel alone", _FOLDER),
    (r"\bcondition_embedder\.", "the weights of a WanTransformer3DModel alone", _FOLDER),
)  # fmt: skip


def foreign_message(path: Path, names: Iterable[str], *, is_export: bool = False) -> str:
    """The message that refuses a file with tensors of these names, which is no artifact."""
    what, todo = foreign_kind(names)
    by = "exported by deme, no artifact" if is_export else "not written by deme"
    return f"{path}: {what}, {by}; {todo}"


def foreign_kind(names: Iterable[str]) -> tuple[str, str]:
    """What a file with tensors of these names is, and what to do with it."""
    text = "\n".join(names)
    for part, what, todo in _KINDS:
        if re.search(part, text):
            return what, todo
    return "no model that deme knows", _UNKNOWN


def pickled_names(path: Path) -> list[str]:
    """The words in a pickle or in a zip of one, tensors' names among them; [] of another file."""
    import pickletools  # a few milliseconds that only a pickle is worth

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
