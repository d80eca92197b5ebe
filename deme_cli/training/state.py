"""What a training run consists of between two updates, and its checkpoint on disk.

Two networks: the one under training, with its projections, and the frozen base. What is trained of
the first is what wants gradients; beside it what weighs the losses, moving averages, AdamW's
moments, the loss scale, the number of updates. The learning rate is a function of the update and
every random draw of (seed, update), so nothing else needs to be kept. A checkpoint appears whole
or not at all and is verified when read.

In half precision (autocast) the weights under training stay float32. The base's would be cast anew
at every forward, for autocast remembers only casts of weights that get gradients: what it would
cast is therefore held in half precision, of which the outputs are the same to the last bit.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from deme_cli.artifacts import Record, fingerprint_file
from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.adapters import attach_adapters, shared_copy, target_layers
from deme_cli.diffusion.denoiser import TORCH_DTYPES, kept_in_float32
from deme_cli.diffusion.projection import attach_projections
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.files import read_header
from deme_cli.training.power_profile import beta, gamma_of
from deme_cli.training.setup import checkpoint_path
from deme_cli.training.sharding import own_part, put, shard, write_gathered
from deme_cli.training.weighting import Reduction

if TYPE_CHECKING:
    from deme_cli.training.setup import Run

_MOMENTS = ("exp_avg", "exp_avg_sq")
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by autocast, on every device


def open_networks(run: Run) -> tuple[nn.Module, nn.Module | None]:
    """The network to train, with projections, and the frozen base (None where no loss asks it).

    As they run fastest: in half precision the base that is run becomes a copy (unless it is to be
    divided), and on a GPU the denoiser's own network moves to the processor; convolutions there
    keep their channels last, the order in which tensor cores take them (files are the same). With
    adapters both share one set of weights, at rest in half precision where it is run so.
    Raises ConfigError where gradient checkpointing is asked of a network that has none.
    """
    original, half, device = run.denoiser.network, TORCH_DTYPES[run.dtype], run.denoiser.device
    config = run.config
    if config.lora:
        hold_at_rest(original, run.dtype)  # also the base's, whose tensors are shared
    elif half != torch.float32:
        keep_in_float32(original)
    network: Any = shared_copy(original) if config.lora else copy.deepcopy(original)
    network.train().requires_grad_(not config.lora)
    if config.gradient_checkpointing:
        try:
            network.enable_gradient_checkpointing()
        except ValueError as error:
            raise ConfigError(
                f"gradient_checkpointing: {type(network).__name__} does not support it; leave it "
                f"out, and use --micro-batch or --dtype bf16 for less memory"
            ) from error
    base = original if config.consistency else None
    if config.lora:
        layers, alpha = target_layers(network, config.lora_targets), config.lora_alpha
        attach_adapters(network, layers, rank=config.lora, alpha=alpha, seed=config.seed)
    else:
        attach_projections(network, config.projection)
    network.to(device)
    if half == torch.float32:
        return network, base
    if base is not None and not config.lora:
        base = hold_in(base if run.shard else copy.deepcopy(base), half)
        if device.type == "cuda":
            original.cpu()
    for one in (network, base) if device.type == "cuda" else ():
        # a transformer has one convolution at most, which cuts patches
        if one is not None and sum(isinstance(m, nn.Conv2d) for m in one.modules()) > 1:
            one.to(memory_format=torch.channels_last)
    return network, base


class _Float32Linear(nn.Linear):
    """Computes in float32 within autocast, too: of what diffusers keeps in float32."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def keep_in_float32(network: nn.Module) -> None:
    """Let the linear layers that diffusers keeps in float32 compute so within autocast."""
    kept = kept_in_float32(network)
    for name, module in network.named_modules():
        if type(module) is nn.Linear and not kept.isdisjoint(name.split(".")):
            module.__class__ = _Float32Linear


def hold_in(network: nn.Module, half: torch.dtype) -> nn.Module:
    """`network` with the weights that autocast casts held in `half`; norms stay as they are."""
    for module in network.modules():
        if isinstance(module, _CAST) and not isinstance(module, _Float32Linear):
            module.to(half)
    return network


def hold_at_rest(network: nn.Module, dtype: str) -> nn.Module:
    """`network` as it is run in a dtype, frozen: what diffusers keeps in float32 stays so."""
    if dtype == "fp32":
        return network
    keep_in_float32(network)
    return hold_in(network, TORCH_DTYPES[dtype])


def learning_rate(step: int, config: FinetuneConfig) -> float:
    """The rate of update `step` (from 0): warm-up, then constant, or down to 0 (linear, cosine)."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    falls = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.lr * falls.get(config.lr_schedule, 1.0)


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord(Record):
    """The header of a checkpoint: the run it belongs to and how far it is. Not an artifact kind."""

    kind: ClassVar[str] = "checkpoint"
    identity: dict[str, Any]
    step: int
    loss_scale: dict[str, Any]


class TrainingState:
    """The network under training with everything that `step` updates change, and the frozen base.

    `parameters`: what is trained of the network, by name; its other weights are the base's, and no
    checkpoint or result holds them. `averages` of these, theta_hat(t) = beta_t theta_hat(t - 1) +
    (1 - beta_t) theta(t), by the length of their power function, under None the usual one: beta_1 =
    0 forgets where the run started. In float32 whatever the weights are: 4 bytes more for each.
    """

    def __init__(
        self, network: nn.Module, reduction: Reduction, config: FinetuneConfig, *,
        scale_loss: bool, base: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.device = next(network.parameters()).device
        self.network, self.base, self.reduction = network, base, reduction.to(self.device)
        self.config, self.step = config, 0
        named = dict(network.named_parameters())
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        self._frozen = named.keys() - self.parameters.keys()
        groups: list[dict[str, Any]] = [{"params": list(self.parameters.values())}]
        if own := list(reduction.parameters()):
            groups.append({"params": own, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8,  # as the paper's
            weight_decay=config.weight_decay,
            fused=True,  # on processors 4 to 6 times as fast as foreach
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scale_loss)
        lengths = [*(config.ema_lengths or []), *([None] if config.ema_decay else [])]
        self.averages: dict[float | None, dict[str, Tensor]] = {
            length: {name: p.detach().float().clone() for name, p in self.parameters.items()}
            for length in lengths
        }

    def update(self) -> None:
        """One optimizer update from the gradients at hand, then the moving averages."""
        parameters = list(self.parameters.values())
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        network, *learned = self.optimizer.param_groups
        network["lr"] = learning_rate(self.step, self.config)
        for group in learned:
            group["lr"] = self.reduction.own_lr or network["lr"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for length, average in self.averages.items():
            if length is None:  # diffusers' EMAModel with the warm-up of its recipe
                decay = min(self.config.ema_decay, 1 - self.step**-0.75)
            else:
                decay = beta(self.step, gamma_of(length))
            # one pass over the weights, where EMAModel.step makes three
            weights = [p.detach().float() for p in parameters]
            torch._foreach_lerp_(list(average.values()), weights, 1 - decay)

    def weights(self, length: float | None = None) -> dict[str, Tensor]:
        """What a result holds: the averages of this length in place of what is trained.

        length: of a power function; None for what the run is for: the usual moving average, or the
        last weights without it.
        """
        return self._last_weights() | self.averages.get(length, {})

    def _last_weights(self) -> dict[str, Tensor]:
        state = self.network.state_dict()
        return {name: value for name, value in state.items() if name not in self._frozen}

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that the optimizer moves, the network's first."""
        return {**self.parameters, **dict(self.reduction.named_parameters(prefix="reduction"))}

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by its name there."""
        parts: dict[str, dict[str, Any]] = {
            "network": self._last_weights(), "reduction": self.reduction.state_dict(),
        }  # fmt: skip
        moved = {name: self.optimizer.state.get(p) for name, p in self.trained().items()}
        for key in (*_MOMENTS, "step"):
            parts[key] = {name: known[key] for name, known in moved.items() if known}
        for length, average in self.averages.items():
            parts["ema" if length is None else f"power_ema_{length}"] = average
        return {f"{part}.{n}": value for part, named in parts.items() for n, value in named.items()}

    def save(self, path: Path, identity: dict[str, Any], world: World = ALONE) -> None:
        """Write the checkpoint of the run that `identity` describes; all processes, one file."""
        record = CheckpointRecord(
            identity=identity, step=self.step, loss_scale=self.scaler.state_dict()
        )
        write_gathered(path, self._tensors(), record, world)

    def restore(self, path: Path, identity: dict[str, Any], output: Path) -> None:
        """Continue from a checkpoint, read tensor by tensor.

        Raises ConfigError if it belongs to a run with other settings (naming the first that
        differs), ArtifactError if its bytes are not those that were written.
        """
        header = read_header(path)
        document = json.loads(header.metadata["deme"])
        require_same_run(document["identity"], identity, output)
        if fingerprint_file(path) != document["fingerprint"]:
            raise ArtifactError(f"{path}: the checkpoint is corrupt; --force starts the run anew")
        for name, parameter in self.trained().items():
            if f"step.{name}" in header.tensors:
                moments = {key: torch.zeros_like(parameter) for key in _MOMENTS}
                count = torch.zeros((), device=parameter.device)
                self.optimizer.state[parameter] = {"step": count, **moments}
        with safe_open(path, "pt") as file:
            for name, tensor in self._tensors().items():
                put(tensor, file.get_tensor(name))
        self.step = document["step"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(document["loss_scale"])

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every weight that this process holds is a number (asks the device once)."""
        norms = torch._foreach_norm(list(map(own_part, self.parameters.values())))
        return bool(torch.isfinite(torch.stack(norms)).all())


def open_state(run: Run, world: World) -> TrainingState:
    """A run at its start, or where the checkpoint that is kept has it."""
    network, base = open_networks(run)
    for one in (network, base) if run.shard else ():
        if one is not None:
            shard(one, world)
    reduction = Reduction(run.config, run.denoiser.schedule, run.clusters)
    state = TrainingState(network, reduction, run.config, scale_loss=run.dtype == "fp16", base=base)
    if (checkpoint := checkpoint_path(run.output)).exists():
        state.restore(checkpoint, run.identity, run.output)
    return state


def require_same_run(kept: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    """Check that a kept run is the one asked for; raises ConfigError naming what differs."""
    for name in ("data", *wanted):
        if kept.get(name) != wanted[name]:
            told = f"with {name} = {kept.get(name)!r} is kept here, not {wanted[name]!r}"
            if name == "data":
                told = "that began on other images or captions is kept here"
            raise ConfigError(
                f"{output}: an unfinished run {told}; use the same settings to continue, --force "
                f"to start anew, or another --output"
            )
