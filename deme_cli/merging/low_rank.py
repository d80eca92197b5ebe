"""`export_lora`: what a model changed of its base, as a LoRA that every loader takes.

D = theta - theta_base of one layer: (out, in, *kernel), as a matrix (out, in x kernel). The best
D_r of rank r keeps the largest singular values (Eckart and Young 1936): U_r U_r^T D, with U_r the
first eigenvectors of D D^T (or the same from the right, of the smaller side). U_r is orthonormal
however small the singular values are, so that at full rank D comes back but for rounding. Shares
are of squares: 1 - |D - B A|^2 / |D|^2, of the factors as they are stored.

Linear layers and convolutions have factors; norms, biases and tables have none. What these hold of
the difference is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deme_cli.artifacts import (
    ExpertRecord,
    MergedRecord,
    TaskVectorRecord,
    export_metadata,
    load_tensors,
    record_of,
)
from deme_cli.console import Progress, Step, silent
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.backbones.backbone import Backbone
from deme_cli.diffusion.denoiser import TORCH_DTYPES
from deme_cli.diffusion.lora import LowRank, layers_of, low_rank_factors
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.files import Header, read_header, require_output, write_whole
from deme_cli.merging.factors import ROUNDING, truncated
from deme_cli.merging.inputs import is_projection, locate_base, require_same_tensors
from deme_cli.merging.task_vectors import block_of
from deme_cli.model_spec import model_spec
from deme_cli.run_file import RunFile

FORMATS = ("diffusers", "kohya")


@dataclass(frozen=True)
class LoraExport:
    """ranks: by layer.   kept: the share of the squared difference that the LoRA holds, by block
    and of all (`total`).   left_out: tensors that changed and have no factors; their share of it.
    """

    ranks: dict[str, int]
    kept: dict[str, float]
    left_out: list[str]
    left_out_share: float


def export_lora(
    artifact: Path, output: Path, *, rank: int | None = None, explained: float | None = None,
    format: str = "diffusers", base: Path | None = None, run: RunFile | None = None,
    save_dtype: str | None = None, force: bool = False, progress: Progress = silent,
) -> LoraExport:  # fmt: skip
    """Write the difference of a merged model, an expert or a task vector as a LoRA.

    rank: of every layer, or its full one.   explained: instead, the least ranks that keep this
    share of each layer's squared difference.   format: whose names, of FORMATS.   base: None for
    that of `run`, or the one beside.   save_dtype: None for float32.

    Raises ConfigError, MissingError, ArtifactError (another base, block projections, no
    difference), NumericsError for a difference that is not finite.
    """
    _check(rank, explained, format, output)
    require_output(output, force=force, inputs=[artifact])
    header = read_header(artifact)
    record = record_of(header)
    if not isinstance(record, MergedRecord | ExpertRecord):
        raise ArtifactError(
            f"{artifact}: expected an artifact of kind 'merged', 'expert' or 'task-vector', found "
            f"{record.kind!r}"
        )
    if any(map(is_projection, header.tensors)):
        raise ArtifactError(
            f"{artifact}: carries block projections, which no LoRA holds; finetune with "
            f"--projection fold to export"
        )
    config, factors = record.model_config, dict[str, LowRank]()
    if record.holds == "adapter":  # neither a base nor a decomposition of whole weights
        factors = low_rank_factors(load_tensors(artifact), config, str(artifact))
        changes = _products(artifact, factors)
    else:
        origin = read_header(locate_base(artifact, record.base, run or RunFile(), base))
        require_output(output, force=force, inputs=[origin.path])
        changes = _differences(origin, header, is_vector=isinstance(record, TaskVectorRecord))
    backbone, layers = backbone_of(config, str(artifact)), layers_of(config)
    _require_names(format, backbone)
    dtype = TORCH_DTYPES[save_dtype or "fp32"]
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    squares: dict[str, list[float]] = {}  # by block: of the difference, of what is lost of it
    left_out: dict[str, float] = {}
    for done, (name, change) in enumerate(changes, 1):
        square = lost = change.square().sum().item()
        layer = name.removesuffix(".weight")
        if square and layer in layers and layer != name:
            pair = low_rank(change, rank=rank, explained=explained, of=factors.get(layer))
            ranks[layer] = len(pair.down)
            scale = 1 / len(pair.down) if format == "kohya" else 1.0
            down, up = (side.to(dtype) for side in (pair.down, pair.up / scale))
            held = LowRank(down.double(), up.double() * scale).change()
            lost = (change - held).square().sum().item()
            state |= _named(layer, LowRank(down, up), format, backbone.part)
        elif square:
            left_out[name] = square
        block = squares.setdefault(block_of(name), [0.0, 0.0])
        block[0], block[1] = block[0] + square, block[1] + lost
        progress(Step(done, len(header.tensors), "factors", "tensor"))
    if not state:
        raise ArtifactError(f"{artifact}: no layer differs from its base")
    from safetensors.torch import save

    told = model_spec(record, output.stem, artifact=artifact)
    told["modelspec.architecture"] += "/lora"
    plain = save(state)
    digest = hashlib.sha256(memoryview(plain)[8 + int.from_bytes(plain[:8], "little") :])
    write_whole(output, save(state, export_metadata(record, told, digest.hexdigest())))
    whole, gone = (sum(column) for column in zip(*squares.values(), strict=True))
    kept = {block: 1 - lost / square for block, (square, lost) in squares.items() if square}
    left = sum(left_out.values()) / whole
    return LoraExport(ranks, {**kept, "total": 1 - gone / whole}, sorted(left_out), left)


def _check(rank: int | None, explained: float | None, format: str, output: Path) -> None:
    if (rank is None) == (explained is None):
        raise ConfigError("a LoRA needs one of --lora RANK and --explained SHARE")
    if rank is not None and rank < 1:
        raise ConfigError(f"--lora {rank}: expected a rank of 1 or more")
    if explained is not None and not 0 < explained <= 1:
        raise ConfigError(f"--explained {explained}: expected a share above 0, up to 1")
    if format not in FORMATS:
        raise ConfigError(f"--lora-format {format}: expected {' or '.join(FORMATS)}")
    if output.suffix != ".safetensors":
        raise ConfigError(f"{output}: a LoRA is one file; give it a name that ends in .safetensors")


def _require_names(format: str, backbone: Backbone) -> None:
    if format == "kohya" and backbone.part != "unet":
        raise ConfigError(
            f"--lora-format kohya: kohya's names for a {backbone.class_name} are those of another "
            f"network; leave it out: ComfyUI reads diffusers' names too"
        )


def _named(layer: str, pair: LowRank, format: str, part: str) -> dict[str, Tensor]:
    """The factors under the names of a format.

    Those of kohya with its usual alpha of 1: where it differs by layer, diffusers loses some.
    """
    up = pair.up.view(*pair.up.shape, *[1] * (pair.down.ndim - 2)).contiguous()
    down = pair.down.contiguous()
    if format == "diffusers":
        name = f"{part}.{layer}"
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    name, alpha = f"lora_unet_{layer.replace('.', '_')}", torch.tensor(1.0)
    return {
        f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
        f"{name}.alpha": alpha.to(down.dtype),
    }  # fmt: skip


def low_rank(
    change: Tensor, *, rank: int | None = None, explained: float | None = None,
    of: LowRank | None = None,
) -> LowRank:  # fmt: skip
    """The best factors of a rank, or of the least rank that keeps a share of the squares.

    change: (out, in, *kernel), float64.   of: factors of the change, if it is known to have some.
    Both factors have columns and rows of the same length, so that half precision holds either.
    """
    if of is not None:
        sides = (side.double().flatten(1).numpy() for side in of.sides)
        down, up = map(torch.from_numpy, truncated(*sides, rank=rank, explained=explained))
        return LowRank(down.unflatten(1, change.shape[1:]), up)
    matrix = change.flatten(1)
    is_wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if is_wide else matrix.T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    squares = values.flip(0).clamp(min=0)
    shares = squares.cumsum(0) / squares.sum()
    least = int((shares < (explained or 1) - ROUNDING).sum()) + 1
    left = vectors.flip(1)[:, : min(least, rank or least, len(squares))]  # (side, r)
    right = left.T @ matrix
    lengths = right.norm(dim=1).sqrt().clamp(min=torch.finfo(matrix.dtype).tiny)
    left, right = left * lengths, right / lengths[:, None]
    down, up = (right, left) if is_wide else (left.T, right.T)
    return LowRank(down.unflatten(1, change.shape[1:]), up)


def _products(artifact: Path, factors: Mapping[str, LowRank]) -> Iterator[tuple[str, Tensor]]:
    """B A of each layer, float64, one after another."""
    for layer, pair in factors.items():
        change = LowRank(*(side.double() for side in pair.sides)).change()
        if not change.isfinite().all():
            raise NumericsError(f"{artifact}: the factors of {layer!r} are not finite")
        yield f"{layer}.weight", change


def _differences(base: Header, model: Header, *, is_vector: bool) -> Iterator[tuple[str, Tensor]]:
    """Each floating-point tensor's difference, float64, one after another."""
    from safetensors import safe_open

    require_same_tensors(base, model, projections=False)
    with safe_open(model.path, "pt") as theirs, safe_open(base.path, "pt") as own:
        for name in base.tensors:
            tensor = theirs.get_tensor(name)
            if not tensor.is_floating_point():
                continue
            change = tensor.double() - (0 if is_vector else own.get_tensor(name).double())
            if not change.isfinite().all():
                raise NumericsError(f"{model.path}: {name!r} is not finite")
            yield name, change
