"""One compiled network for all who denoise: its weights become those of the one whose turn it is.

Compiling takes a minute, copying weights on a GPU about as long as reading them twice. So the
experts of an ensemble, and the models of a table, are kept as plain weights and copied in place
into the one network that is compiled. A network of another structure (block projections, another
config) gets a compiled one of its own.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor, nn

from deme_cli.diffusion.compiling import compile_calls, is_compiled
from deme_cli.diffusion.denoiser import Denoiser


class CompiledNetworks:
    """Compiled networks by structure. how, num_forwards: as `is_compiled` takes them.

    num_loads: how many denoisers will come; a single one is compiled itself, without a copy.
    """

    def __init__(self, how: str, *, num_forwards: int, num_loads: int) -> None:
        self._how, self._num_forwards, self._num_loads = how, num_forwards, num_loads
        self._networks: dict[Hashable, nn.Module] = {}

    def is_on(self, device: torch.device) -> bool:
        """Whether calls are compiled on `device`. Raises what `is_compiled` raises."""
        return is_compiled(device, self._how, num_forwards=self._num_forwards)

    @torch.no_grad()
    def carry(self, denoiser: Denoiser) -> Denoiser:
        """`denoiser` with compiled calls, until the next one is carried; as it is, if they are off.

        Its weights are copied, so that it may be let go.
        """
        if not self.is_on(denoiser.device):
            return denoiser
        key = _structure(denoiser)
        network = self._networks.get(key)
        if network is None:
            network = denoiser.network
            if self._num_loads > 1:
                network = copy.deepcopy(network)
            compile_calls(network, self._how)
            self._networks[key] = network
        elif network is not denoiser.network:
            torch._foreach_copy_(_tensors(network), _tensors(denoiser.network))
        return replace(denoiser, network=network)


UNCOMPILED = CompiledNetworks("off", num_forwards=0, num_loads=0)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in the network's order."""
    return [*network.parameters(), *network.buffers()]


def _structure(denoiser: Denoiser) -> Hashable:
    """What two networks share that compute the same function of their weights."""
    config = json.dumps(denoiser.record.model_config, sort_keys=True)
    network = denoiser.network
    named = [*network.named_parameters(), *network.named_buffers()]
    return config, tuple((name, t.shape, t.dtype, t.device) for name, t in named)
