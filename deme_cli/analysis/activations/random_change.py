"""Random weight changes as large as an expert's: what any change of that size does to a network.

A convolution or a linear layer does the same at every place, so that weights changed at random
move channels, too. Only what an expert does beyond that says something about finetuning.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from deme_cli.diffusion.projection import attach_projections, has_projections
from deme_cli.training.batches import derived_generator


def randomly_changed(base: nn.Module, expert: nn.Module, *, seed: int, k: int) -> nn.Module:
    """A new network theta + n_k, n_k Gaussian, each tensor's with the norm of the expert's change.

    Block projections that only one of the networks has are the identity in the other. The noise of
    a tensor depends on (seed, k, its name) alone, and is drawn on the CPU whatever the device. In
    half precision the sum is rounded, so that of a very small change less may be left.
    """
    changed = copy.deepcopy(expert)
    before, after = base.state_dict(), expert.state_dict()
    if has_projections(before) and not has_projections(after):
        attach_projections(changed, "block")
        changed.to(next(expert.parameters()))
    for name, tensor in changed.state_dict().items():
        if tensor.is_floating_point():
            theta = _known(before, name, tensor)
            change = _known(after, name, tensor) - theta
            generator = derived_generator(seed, "random change", k, name)
            noise = torch.randn(change.shape, generator=generator)
            tensor.copy_(theta + noise * (change.norm() / noise.norm()))
    return changed.requires_grad_(False)


def _known(weights: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor as float32 on the CPU; the identity for a projection that a network lacks."""
    return weights[name].float().cpu() if name in weights else torch.eye(len(like))
