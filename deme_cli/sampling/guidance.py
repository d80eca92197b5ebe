"""Classifier-free guidance: eps = eps(null) + g (eps(c) - eps(null))  (Ho & Salimans 2022, Eq. 6).

g counts as in diffusers, where 1 is no guidance; theirs is w = g - 1. The formula is linear, so it
holds for v, x_0 and velocities as well. Both predictions come from one forward of batch 2B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deme_cli.diffusion.conditions import Conditions, to
from deme_cli.diffusion.denoiser import Denoiser


def predict_guided(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, conditions: Conditions, *, scale: float | None,
    size: int = 0,
) -> Tensor:  # fmt: skip
    """The prediction at (x_t, t), guided where there is a scale.

    x_t: (B, C, h, w)   t: ()   conditions: of batch B, or 2B with the null first where there is a
    scale   ->   (B, C, h, w) float32. size: a smaller batch is filled up to it for the network, and
    cut again.
    """
    told = to(conditions, denoiser.device, denoiser.dtype)
    if scale is None:
        return _predict(denoiser, x_t, t, told, size=size)
    pair = _predict(denoiser, torch.cat([x_t, x_t]), t, told, size=2 * size)
    null, conditional = pair.chunk(2)
    return null + scale * (conditional - null)


def _predict(denoiser: Denoiser, x_t: Tensor, t: Tensor, told: Conditions, *, size: int) -> Tensor:
    """The network's prediction in a batch of at least `size`.  -> (B, C, h, w) float32"""
    num = len(x_t)
    if num < size:
        x_t = _filled(x_t, size)
        told = {name: _filled(value, size) for name, value in told.items()}
    return denoiser.backbone.predict(denoiser.network, x_t, t, told)[:num].float()


def _filled(batch: Tensor, size: int) -> Tensor:
    """(B, ...) -> (size, ...): the last member again and again, as finite as it is."""
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])
