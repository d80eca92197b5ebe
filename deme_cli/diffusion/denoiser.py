"""The network that predicts noise, with the schedule it was trained for, as one thing.

A denoiser comes from an artifact of kind base, expert or merged. Which network it is, its backbone
knows (backbones/).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deme_cli import console
from deme_cli.artifacts import (
    DenoiserRecord,
    ExpertRecord,
    MergedRecord,
    load_tensors,
    read_record,
)
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.backbones.backbone import Backbone, Shape
from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.projection import attach_projections, backbone_of_network, has_projections
from deme_cli.diffusion.schedule import Schedule, read_schedule
from deme_cli.errors import ArtifactError, ConfigError, MissingError, NumericsError
from deme_cli.files import cast_specs
from deme_cli.run_file import RunFile, locate_base

Weights = Mapping[str, Tensor]
GUESSED = (
    "no scheduler config found; took diffusers' DDPM defaults (T = 1000, linear betas, predicts "
    "the noise): `deme split MODEL --pipeline DIR` takes those of a pipeline"
)
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Denoiser:
    """A network in evaluation mode, its schedule, and the record it came with."""

    network: nn.Module
    schedule: Schedule
    record: DenoiserRecord

    @property
    def backbone(self) -> Backbone:
        return backbone_of(self.record.model_config)

    @property
    def sample_shape(self) -> Shape:
        """(C, H, W) of x_t at the size the model was made for: of latents where there is a VAE."""
        return self.backbone.sample_shape(self.record.model_config)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        kept = kept_in_float32(self.network)
        named = self.network.named_parameters()
        return next(p.dtype for name, p in named if kept.isdisjoint(name.split(".")))


def predict(
    network: nn.Module, x_t: Tensor, t: Tensor, conditions: Conditions | None = None
) -> Tensor:
    """The network's prediction at (x_t, t).

    x_t: (B, C, H, W)   t: times (B,) or ()   conditions: (B, ...) each, by the network's keyword
    ->   (B, C, H, W)
    """
    return backbone_of_network(network).predict(network, x_t, t, conditions or {})


def build_network(model_config: Mapping[str, Any], where: str = "the model") -> nn.Module:
    """A network with random weights for a diffusers config.

    Raises ArtifactError for classes deme does not take, and for configs that diffusers refuses.
    """
    backbone = backbone_of(model_config, where)
    try:
        return backbone.build(model_config)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise ArtifactError(f"{where}: unusable model config: {error}") from error


def load_weights_into(network: nn.Module, weights: Weights, where: str) -> None:
    """Put `weights` into `network`, attaching block projections if they are among them.

    Raises ArtifactError naming the first name or shape that disagrees, NumericsError the first
    parameter that is not finite.
    """
    if has_projections(weights):
        attach_projections(network, "block")
    own = network.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise ArtifactError(f"{where}: lacks the parameter {name!r} of its model config")
        if tensor.shape != weights[name].shape:
            raise ArtifactError(
                f"{where}: {name!r} has shape {tuple(weights[name].shape)}, "
                f"its model config says {tuple(tensor.shape)}"
            )
    if unknown := sorted(set(weights) - set(own)):
        raise ArtifactError(f"{where}: parameter {unknown[0]!r} is not in its model config")
    require_finite(weights, where)
    network.load_state_dict(weights)


def require_finite(weights: Weights, where: str) -> None:
    """Raises NumericsError naming the first parameter with a NaN or an Inf."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise NumericsError(
                f"{where}: {name!r} holds numbers that are not finite (NaN or Inf); get or make "
                f"the weights anew"
            )


def stored_in(weights: Weights, save_dtype: str | None, where: str) -> dict[str, Tensor]:
    """Weights with their floating-point tensors rounded to `save_dtype`; None for as they are.

    Raises NumericsError for the first tensor with a number that the dtype cannot hold, ConfigError
    for a dtype that is none of SAVE_DTYPES.
    """
    cast_specs((), save_dtype)
    if save_dtype is None:
        return dict(weights)
    kind, stored = TORCH_DTYPES[save_dtype], {}
    for name, tensor in weights.items():
        stored[name] = tensor.to(kind) if tensor.is_floating_point() else tensor
        if not stored[name].isfinite().all() and tensor.isfinite().all():
            raise NumericsError(
                f"{where}: {name!r} is too large for {save_dtype}; use bf16 or fp32"
            )
    return stored


def assemble(
    record: DenoiserRecord,
    weights: Weights,
    where: str,
    *,
    device: str = "cpu",
    dtype: str = "fp32",
) -> Denoiser:
    """The denoiser that a record and its tensors describe, in evaluation mode."""
    if not record.scheduler_config:
        console.note_once(f"{record.origin}: {GUESSED}")
    network = build_network(record.model_config, where)
    load_weights_into(network, weights, where)
    cast(network, TORCH_DTYPES[dtype], kept_in_float32(network))
    network.to(choose_device(device)).eval().requires_grad_(False)
    return Denoiser(network, read_schedule(record.scheduler_config, where), record)


def kept_in_float32(network: nn.Module) -> set[str]:
    """The parts of a diffusers network, by a piece of their names, that half precision spoils."""
    return set(getattr(network, "_keep_in_fp32_modules", None) or ())


def cast(network: nn.Module, dtype: torch.dtype, kept: Set[str]) -> None:
    """Bring what is stored of `network` to `dtype`, its `kept` parts to float32, as libraries do.

    What it computes for itself (tables of positions) stays as it is.
    """
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(
                dtype if kept.isdisjoint(name.split(".")) else torch.float32
            )


def load_denoiser(
    path: Path, *, run: RunFile | None = None, device: str = "cpu", dtype: str = "fp32"
) -> Denoiser:
    """The denoiser in an artifact of kind base, expert or merged; as `whole_weights`."""
    record = read_record(path, "base", "expert", "merged")
    return assemble(record, whole_weights(path, record, run), str(path), device=device, dtype=dtype)


def whole_weights(
    path: Path, record: DenoiserRecord, run: RunFile | None = None
) -> dict[str, Tensor]:
    """All weights of the denoiser in an artifact: of one that holds adapters, fused into its base.

    The base is that of `run`, else looked for as `locate_base` does; floating-point sums come in
    float32.
    """
    tensors = load_tensors(path)
    if not isinstance(record, ExpertRecord | MergedRecord) or record.holds == "all":
        return tensors
    from deme_cli.diffusion.lora import fuse, low_rank_factors

    base = load_tensors(locate_base(path, record.base, run or RunFile(), None))
    wide = {name: t.float() if t.is_floating_point() else t for name, t in base.items()}
    return fuse(wide, low_rank_factors(tensors, record.model_config, str(path)))


def choose_device(name: str) -> torch.device:
    """`auto` (cuda, else mps, else cpu), or the device of that name.

    Raises ConfigError for a name torch does not know, MissingError where it is not on this machine.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: expected auto, cpu, cuda, cuda:i or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MissingError("--device mps: this machine has no Metal GPU")
    return device
