"""Loss weights that are learned: the network's uncertainty at each noise level.

B batch, T timesteps, C channels. Denoising at each noise level is a task, and a task is weighed
by its learned log-variance u (Kendall et al. 2018), here a smooth function of the noise level, as
in EDM2 (Karras et al. 2024, the continuous multi-task loss):

    loss = L(t) / exp(u(t)) + u(t),   least where u(t) = ln E[L(t)]

so every timestep ends with the same pull on the network, whatever the size of its loss. u is one
linear layer on fixed random Fourier features of c_noise = ln(sigma) / 4, sigma = SNR^(-1/2), and
is thrown away after training.

Two departures: L is the loss of the network's own target, and u is 0 at the start with a bias of
its own, so that training begins as the plain loss. EDM2 normalises random weights instead, which
suits training from nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from deme_cli.diffusion.schedule import Schedule


class Uncertainty(nn.Module):
    """u(t), the learned log-variance of the loss at draw t; float32.

    The features are drawn from `seed` and saved with the weights: a state_dict restores all of u.
    """

    frequencies: Tensor
    phases: Tensor
    noise_levels: Tensor

    def __init__(self, schedule: Schedule, *, channels: int = 128, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", torch.randn(channels, generator=generator))  # (C,)
        self.register_buffer("phases", torch.rand(channels, generator=generator))  # (C,)
        self.register_buffer("noise_levels", noise_levels(schedule))  # (T,)
        self.weight = nn.Parameter(torch.zeros(channels))  # nn.Linear would draw a global seed
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor) -> Tensor:
        """u of draws t: (B,) integer -> (B,) float32."""
        c_noise = self.noise_levels[t][:, None]  # (B, 1)
        turns = c_noise * self.frequencies + self.phases  # (B, C)
        features = math.sqrt(2) * torch.cos(2 * math.pi * turns)
        return (features * self.weight).sum(1) + self.bias  # in float32 under autocast, too

    def weigh(self, losses: Tensor, t: Tensor) -> Tensor:
        """mean(L / exp(u) + u) over a batch.  losses: (B,) per image, t: (B,) draws -> scalar"""
        u = self(t)
        return (losses * torch.exp(-u) + u).mean()


def noise_levels(schedule: Schedule) -> Tensor:
    """c_noise = ln(sigma) / 4 per draw (Karras et al. 2022, Tab. 1).  (T,) float32

    A draw of pure noise or of no noise counts as the noisiest or cleanest one that has both.
    """
    c_noise = -schedule.snr.log() / 8
    finite = c_noise[c_noise.isfinite()]
    return c_noise.clamp(finite.min(), finite.max()).float()
