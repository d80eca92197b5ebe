"""What a training run consists of between two updates, and its checkpoint on disk.

Network (with its projections), what weighs its losses, moving averages, AdamW's moments, loss
scale, number of updates.
The learning rate is a function of the update and every random draw of (seed, update), so
nothing else needs to be kept. A checkpoint appears whole or not at all and is verified when read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from deme_cli.artifacts import Record, fingerprint_file
from deme_cli.config import FinetuneConfig
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.files import read_header
from deme_cli.training.averages import open_averages
from deme_cli.training.reduction import Reduction
from deme_cli.training.sharding import own_part, put, write_gathered

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAM = (*_MOMENTS, "step")


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord(Record):
    """The header of a checkpoint: the run it belongs to and how far it is. Not an artifact kind."""

    kind: ClassVar[str] = "checkpoint"
    identity: dict[str, Any]
    step: int
    loss_scale: dict[str, Any]


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


def require_same_run(found: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    """Check that a kept run is the one asked for; raises ConfigError naming what differs."""
    if found.get("data") != wanted.get("data"):
        raise ConfigError(
            f"{output}: an unfinished run is kept here that began on other images or captions (or "
            f"with an earlier deme, which did not compare every byte); give the same data, --force "
            f"to start anew, or another --output"
        )
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise ConfigError(
                f"{output}: an unfinished run with {name} = {found.get(name)!r} is kept here, not "
                f"{wanted[name]!r}; use the same settings to continue, --force to start anew, "
                f"or another --output"
            )
