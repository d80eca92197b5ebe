"""Averages of the weights with power-function profiles, kept while a run trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deme_cli.training.power_profile import beta, gamma_of


class PowerAverage:
    """theta_hat(t) = beta_t theta_hat(t - 1) + (1 - beta_t) theta(t)  (EDM2 Eq. 127).

    `tensors` are in the order of the parameters, in float32 whatever those are: one more copy of
    the weights on the device, 4 bytes per parameter.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], length: float) -> None:
        self.length, self.gamma = length, gamma_of(length)
        self.tensors: list[Tensor] = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter], t: int) -> None:
        """Take in the weights after update t (1 is the first)."""
        weights = [p.detach().float() for p in parameters]
        torch._foreach_lerp_(self.tensors, weights, 1 - beta(t, self.gamma))
