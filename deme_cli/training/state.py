"""What a training run consists of between two updates, and its checkpoint on disk.

Two networks: the one under training, with its projections, and the frozen base. Beside the first,
what weighs its losses, moving averages, AdamW's moments, loss scale, number of updates. The
learning rate is a function of the update and every random draw of (seed, update), so nothing else
needs to be kept. A checkpoint appears whole or not at all and is verified when read.

In half precision (autocast) the weights under training stay float32. The base's would be cast anew
at every forward, for autocast remembers only casts of weights that get gradients: what it would
cast is therefore held in half precision, of which the outputs are the same to the last bit.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from deme_cli.artifacts import Record, fingerprint_file
from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.compiling import compile_network
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
_ADAM = (*_MOMENTS, "step")
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by autocast, on every device


def open_state(run: Run, world: World) -> tuple[TrainingState, nn.Module | None]:
    """What is trained, as it is at the start or in the checkpoint that is kept; the frozen base."""
    network, base = for_precision(run, *open_networks(run))
    if run.shard:
        for one in (network, base) if base is not None else (network,):
            shard(one, world)
    reduction = Reduction(run.config, run.denoiser.schedule, run.clusters)
    state = TrainingState(network, reduction, run.config, scale_loss=run.dtype == "fp16")
    if (checkpoint := checkpoint_path(run.output)).exists():
        state.restore(checkpoint, run.identity, run.output)
    return state, base


class _Float32Linear(nn.Linear):
    """Computes in float32 within autocast, too: of what diffusers keeps in float32."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def open_networks(run: Run) -> tuple[nn.Module, nn.Module | None]:
    """The network to train, with projections, and the frozen base (None where no loss asks it).

    Raises ConfigError where gradient checkpointing is asked of a network that has none.
    """
    network: Any = copy.deepcopy(run.denoiser.network).train().requires_grad_(True)
    if run.config.gradient_checkpointing:
        try:
            network.enable_gradient_checkpointing()
        except ValueError as error:
            raise ConfigError(
                f"gradient_checkpointing: {type(network).__name__} does not support it; leave it "
                f"out, and use --micro-batch or --dtype bf16 for less memory"
            ) from error
    attach_projections(network, run.config.projection)
    network.to(run.denoiser.device)
    return network, run.denoiser.network if run.config.consistency else None


def for_precision(
    run: Run, network: nn.Module, base: nn.Module | None
) -> tuple[nn.Module, nn.Module | None]:
    """The networks as they run fastest in the run's precision.

    In half precision the base that is run becomes a copy (unless it is to be divided), and on a GPU
    the denoiser's own network moves to the processor; convolutions there keep their channels last,
    the order in which tensor cores take them (weights on disk are the same).
    """
    half, device = TORCH_DTYPES[run.dtype], run.denoiser.device
    if half == torch.float32:
        return network, base
    for one in (network, base):
        if one is not None:
            keep_in_float32(one)
    if base is not None:
        original, base = base, hold_in(base if run.shard else copy.deepcopy(base), half)
        if device.type == "cuda":
            original.cpu()
    for one in (network, base) if device.type == "cuda" else ():
        if one is not None and is_convolutional(one):
            one.to(memory_format=torch.channels_last)
    return network, base


def hold_in(network: nn.Module, half: torch.dtype) -> nn.Module:
    """`network` with the weights that autocast casts held in `half`; norms stay as they are."""
    for module in network.modules():
        if isinstance(module, _CAST) and not isinstance(module, _Float32Linear):
            module.to(half)
    return network


def keep_in_float32(network: nn.Module) -> None:
    """Let the linear layers that diffusers keeps in float32 compute so within autocast."""
    kept = kept_in_float32(network)
    for name, module in network.named_modules():
        if type(module) is nn.Linear and not kept.isdisjoint(name.split(".")):
            module.__class__ = _Float32Linear


def is_convolutional(network: nn.Module) -> bool:
    """Whether it works on maps: a transformer has one convolution at most, which cuts patches."""
    return sum(isinstance(module, nn.Conv2d) for module in network.modules()) > 1


def compile_networks(run: Run, networks: Sequence[nn.Module | None], step: int) -> None:
    """Compile what the updates from `step` on will run, where `run.compile` asks for it."""
    if run.shard:  # gathering its blocks would break what is compiled into pieces
        return
    num_forwards = (run.config.steps - step) * run.config.accumulation
    for network in networks:
        if network is not None:
            compile_network(network, run.compile, num_forwards=num_forwards)


def learning_rate(step: int, config: FinetuneConfig) -> float:
    """The rate of update `step` (from 0): warm-up, then constant, or down to 0 (linear, cosine)."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    if config.lr_schedule == "linear":
        return config.lr * (1 - done)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


class Average:
    """theta_hat(t) = beta_t theta_hat(t - 1) + (1 - beta_t) theta(t) after update t = 1, 2, ...

    A moving average of the weights, which forgets where the run started: beta_1 = 0. `tensors` are
    in the order of the parameters, in float32 whatever those are: 4 bytes more per parameter.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: Callable[[int], float]) -> None:
        self.decay = decay
        self.tensors: list[Tensor] = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter], t: int) -> None:
        """Take in the weights after update t, in one pass over them (EMAModel.step makes three)."""
        weights = [p.detach().float() for p in parameters]
        torch._foreach_lerp_(self.tensors, weights, 1 - self.decay(t))


def open_averages(
    parameters: Sequence[nn.Parameter], ema_decay: float, lengths: Sequence[float]
) -> dict[float | None, Average]:
    """The power-function averages by their length; under None the usual one, if it is wanted.

    The usual one's decay is that of diffusers' EMAModel with its warm-up.
    """
    decays: dict[float | None, Callable[[int], float]] = {
        length: partial(beta, gamma=gamma_of(length)) for length in lengths
    }
    if ema_decay:
        decays[None] = partial(warmed_up, ema_decay)
    return {length: Average(parameters, decay) for length, decay in decays.items()}


def warmed_up(decay: float, t: int) -> float:
    """`decay`, approached as 1 - t^(-3/4) (the recipe of unconditional training in diffusers)."""
    return min(decay, 1 - t**-0.75)


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord(Record):
    """The header of a checkpoint: the run it belongs to and how far it is. Not an artifact kind."""

    kind: ClassVar[str] = "checkpoint"
    identity: dict[str, Any]
    step: int
    loss_scale: dict[str, Any]


class TrainingState:
    """The network under training with everything that `step` updates change."""

    def __init__(
        self, network: nn.Module, reduction: Reduction, config: FinetuneConfig, *, scale_loss: bool
    ) -> None:
        self.device = next(network.parameters()).device
        self.network, self.reduction = network, reduction.to(self.device)
        self.config, self.step = config, 0
        groups: list[dict[str, Any]] = [{"params": list(network.parameters())}]
        if own := list(reduction.parameters()):
            groups.append({"params": own, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=1e-8,  # the released recipe (REFERENCE 1.1)
            weight_decay=config.weight_decay,
            fused=True,  # on processors 4 to 6 times as fast as foreach
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scale_loss)
        parameters = list(network.parameters())
        self.averages = open_averages(parameters, config.ema_decay, config.ema_lengths or [])

    def update(self) -> None:
        """One optimizer update from the gradients at hand, then the moving averages."""
        parameters = list(self.network.parameters())
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        rate = learning_rate(self.step, self.config)
        network, *learned = self.optimizer.param_groups
        network["lr"] = rate
        for group in learned:
            group["lr"] = self.reduction.own_lr or rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for average in self.averages.values():
            average.step(parameters, self.step)

    def averaged_weights(self, length: float | None = None) -> dict[str, Tensor]:
        """The weights under the power-function average of `length`; None for the usual weights.

        Those are what the run is for: the moving average, or the last ones without it.
        """
        weights = {name: tensor.detach() for name, tensor in self.network.state_dict().items()}
        if average := self.averages.get(length):
            names = [name for name, _ in self.network.named_parameters()]
            weights.update(zip(names, average.tensors, strict=True))
        return weights

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter that the optimizer moves, the network's first."""
        own = self.reduction.named_parameters(prefix="reduction")
        return [*self.network.named_parameters(), *own]

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by its name there."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"reduction.{name}": v for name, v in self.reduction.state_dict().items()}
        for name, parameter in self.trained():
            for key in _ADAM:
                if parameter in self.optimizer.state:
                    tensors[f"{key}.{name}"] = self.optimizer.state[parameter][key]
        names = [name for name, _ in self.network.named_parameters()]
        for length, average in self.averages.items():
            prefix = "ema" if length is None else f"power_ema_{length}"
            for name, tensor in zip(names, average.tensors, strict=True):
                tensors[f"{prefix}.{name}"] = tensor
        return tensors

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
        for name, parameter in self.trained():
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

    def is_finite(self) -> bool:
        """Whether every weight that this process holds is a number (asks the device once)."""
        norms = torch._foreach_norm([own_part(p.detach()) for p in self.network.parameters()])
        return bool(torch.isfinite(torch.stack(norms)).all())


def require_same_run(kept: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    """Check that a kept run is the one asked for; raises ConfigError naming what differs."""
    if kept.get("data") != wanted.get("data"):
        raise ConfigError(
            f"{output}: an unfinished run is kept here that began on other images or captions (or "
            f"with an earlier deme, which did not compare every byte); give the same data, --force "
            f"to start anew, or another --output"
        )
    for name in wanted:
        if kept.get(name) != wanted[name]:
            raise ConfigError(
                f"{output}: an unfinished run with {name} = {kept.get(name)!r} is kept here, not "
                f"{wanted[name]!r}; use the same settings to continue, --force to start anew, "
                f"or another --output"
            )
