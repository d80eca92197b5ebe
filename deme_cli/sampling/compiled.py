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
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from deme_cli.diffusion.compiling import compile_calls, is_compiled
from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.sampling.ensemble import SamplingExpert


class Step(nn.Module):
    """What the network says in one step, as one graph, with classifier-free guidance.

    eps = eps(null) + g (eps(c) - eps(null))  (Ho & Salimans 2022, Eq. 6). g counts as in diffusers,
    where 1 is no guidance; theirs is w = g - 1. The formula is linear, so it holds for v, x_0 and
    velocities as well. Both predictions come from one forward of batch 2B.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.network = denoiser, denoiser.network
        self._backbone, self._dtype = denoiser.backbone, denoiser.dtype

    def forward(self, x_t: Tensor, t: Tensor, told: Conditions, *, scale: float | None) -> Tensor:
        """The prediction at (x_t, t), guided where there is a scale.

        x_t: (B, C, h, w) float32   t: ()   told: conditions of batch B, or 2B with the null first
        where there is a scale, in the network's dtype   ->   (B, C, h, w) float32
        """
        x_t = x_t.to(self._dtype)
        if scale is None:
            return self._backbone.predict(self.network, x_t, t, told).float()
        pair = self._backbone.predict(self.network, torch.cat([x_t, x_t]), t, told).float()
        null, conditional = pair.chunk(2)
        return null + scale * (conditional - null)


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
    def carry(self, denoiser: Denoiser) -> Step:
        """The step of `denoiser`, compiled, until the next one is carried; a plain one if off.

        Where it is compiled the weights are copied, so that `denoiser` may be let go.
        """
        if not self.is_on(denoiser.device):
            return Step(denoiser)
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
            step.denoiser = replace(denoiser, network=step.network)
        return step


UNCOMPILED = CompiledSteps("off", num_forwards=0, num_loads=0)


class HeldExperts:
    """Experts in memory: all that were taken, or only the last one.

    compiled: what their steps go through; it has weights of its own where it is on, and beside them
    an expert that would be held alone is not kept.
    """

    def __init__(
        self, experts: Sequence[SamplingExpert], *, hold_one: bool, compiled: CompiledSteps
    ) -> None:
        self._experts, self._compiled = experts, compiled
        self._hold_one = hold_one or len(experts) == 1
        self._held: dict[int, Denoiser] = {}
        self._turn: tuple[int, Step] | None = None

    def take(self, index: int) -> Step:
        """The step of expert `index`, good until the next one is taken."""
        if self._turn is None or self._turn[0] != index:
            self._turn = None  # leaves memory before the next one comes
            denoiser = self._held.get(index) or self._experts[index].load()
            if not self._hold_one:
                self._held[index] = denoiser
            self._turn = index, self._compiled.carry(denoiser)
        return self._turn[1]


def _tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in the network's order."""
    return [*network.parameters(), *network.buffers()]


def _structure(denoiser: Denoiser) -> Hashable:
    """What two networks share that compute the same function of their weights."""
    config = json.dumps(denoiser.record.model_config, sort_keys=True)
    network = denoiser.network
    named = [*network.named_parameters(), *network.named_buffers()]
    return config, tuple((name, t.shape, t.dtype, t.device) for name, t in named)
