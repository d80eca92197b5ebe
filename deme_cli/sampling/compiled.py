"""One compiled step for all who denoise: its weights become those of the one whose turn it is.

Compiling takes a minute, copying weights on a GPU about as long as reading them twice. So the
experts of an ensemble, and the models of a table, are kept as plain weights and copied in place
into the network of the one step that is compiled. A network of another structure (block
projections, another config) gets a compiled step of its own.
B batch, C channels, h x w pixels of latents.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deme_cli.diffusion.compiling import compile_calls, is_compiled
from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.sampling.guidance import predict_guided


class Step(nn.Module):
    """What the network says in one step, as one graph: both halves of guidance and their sum."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.network = denoiser.network
        self._backbone, self._dtype = denoiser.backbone, denoiser.dtype

    def forward(self, x_t: Tensor, t: Tensor, told: Conditions, *, scale: float | None) -> Tensor:
        """x_t: (B, C, h, w) float32   t: ()   told, scale: as in `predict_guided`   ->   as x_t"""
        return predict_guided(
            self._backbone, self.network, x_t.to(self._dtype), t, told, scale=scale
        )


@dataclass(frozen=True)
class Carried:
    """A denoiser, and what its steps go through."""

    denoiser: Denoiser
    step: Step


class CompiledSteps:
    """Compiled steps by structure. how, num_forwards: as `is_compiled` takes them.

    num_loads: how many denoisers will come; the network of a single one is not copied.
    """

    def __init__(self, how: str, *, num_forwards: int, num_loads: int) -> None:
        self._how, self._num_forwards, self._num_loads = how, num_forwards, num_loads
        self._steps: dict[Hashable, Step] = {}

    def is_on(self, device: torch.device) -> bool:
        """Whether steps are compiled on `device`. Raises what `is_compiled` raises."""
        return is_compiled(device, self._how, num_forwards=self._num_forwards)

    @torch.no_grad()
    def carry(self, denoiser: Denoiser) -> Carried:
        """`denoiser` with compiled steps, until the next one is carried; with plain ones if off.

        Where they are compiled its weights are copied, so that it may be let go.
        """
        if not self.is_on(denoiser.device):
            return Carried(denoiser, Step(denoiser))
        key = _structure(denoiser)
        step = self._steps.get(key)
        if step is None:
            own = denoiser
            if self._num_loads > 1:
                own = replace(denoiser, network=copy.deepcopy(denoiser.network))
            step = self._steps[key] = Step(own)
            compile_calls(step, self._how)
        elif step.network is not denoiser.network:
            torch._foreach_copy_(_tensors(step.network), _tensors(denoiser.network))
        return Carried(replace(denoiser, network=step.network), step)


UNCOMPILED = CompiledSteps("off", num_forwards=0, num_loads=0)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in the network's order."""
    return [*network.parameters(), *network.buffers()]


def _structure(denoiser: Denoiser) -> Hashable:
    """What two networks share that compute the same function of their weights."""
    config = json.dumps(denoiser.record.model_config, sort_keys=True)
    network = denoiser.network
    named = [*network.named_parameters(), *network.named_buffers()]
    return config, tuple((name, t.shape, t.dtype, t.device) for name, t in named)
