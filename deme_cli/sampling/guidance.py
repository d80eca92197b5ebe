"""Classifier-free guidance: eps = eps(null) + g (eps(c) - eps(null))  (Ho & Salimans 2022, Eq. 6).

g counts as in diffusers, where 1 is no guidance; theirs is w = g - 1. The formula is linear, so it
holds for v, x_0 and velocities as well. Both predictions come from one forward of batch 2B.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deme_cli.diffusion.backbones.backbone import Backbone
from deme_cli.diffusion.conditions import Conditions


def predict_guided(
    backbone: Backbone, network: nn.Module, x_t: Tensor, t: Tensor, told: Conditions, *,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """The prediction at (x_t, t), guided where there is a scale.

    x_t: (B, C, h, w)   t: ()   told: conditions of batch B, or 2B with the null first where there
    is a scale; all on the network's device, in its dtype   ->   (B, C, h, w) float32
    """
    if scale is None:
        return backbone.predict(network, x_t, t, told).float()
    pair = backbone.predict(network, torch.cat([x_t, x_t]), t, told).float()
    null, conditional = pair.chunk(2)
    return null + scale * (conditional - null)
