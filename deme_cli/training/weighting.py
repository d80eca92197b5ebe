"""How much each timestep counts: published loss weightings, learned ones, and their one gradient.

T timesteps, B batch, C channels, k clusters. x_t carries signal of power s and noise of power n
(abar and 1 - abar; (1 - sigma)^2 and sigma^2 in flow matching), and SNR = s / n. Papers weigh the
loss of x_0:

    uniform        SNR                        on the noise: 1 (Ho et al. 2020, Eq. 14)
    snr+1          SNR + 1                    (Salimans & Ho 2022, Sec. 4)
    truncated-snr  max(SNR, 1)                (Salimans & Ho 2022, Sec. 4)
    min-snr        min(SNR, gamma)            gamma = 5 (Hang et al. 2023)
    soft-min-snr   SNR gamma / (SNR + gamma)  gamma = 5 as min-snr (Crowson et al. 2024: 4)
    p2             SNR / (k + SNR)^gamma      gamma = k = 1 (Choi et al. 2022)

At a given x_t one error is every other one rescaled, ||x_0 err||^2 = ||eps err||^2 n / s
= n ||v err||^2 (v of Salimans & Ho, and the velocity eps - x_0 alike), so the same objective has
w_eps = w_x0 n / s and w_v = w_x0 n. With h(s, n) = n w_x0(s / n), of degree 1 in (s, n), these are

    w_eps = h(1, n / s)    w_x0 = h(s / n, 1)    w_v = h(s, n)

one formula per weighting, and no SNR / SNR that is nan where SNR = 0 (zero terminal SNR).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.schedule import FlowSchedule, Schedule
from deme_cli.errors import ConfigError
from deme_cli.timesteps import TimestepRange

GAMMA = {"min-snr": 5.0, "soft-min-snr": 5.0, "p2": 1.0}  # as published, see above


def loss_weights(
    schedule: Schedule, name: str, *, gamma: float | None = None, k: float = 1.0,
    normalise: bool = False,
) -> Tensor | None:  # fmt: skip
    """Weight per draw on the loss of the network's own target.  (T,) float64

    None for "none" (the plain loss) and "uncertainty". `normalise` makes the mean over all T
    draws 1. Raises ConfigError where a weight is not finite.
    """
    if name in ("none", "uncertainty"):
        return None
    signal, noise = powers(schedule)
    gamma = GAMMA.get(name, 1.0) if gamma is None else gamma
    weights = weigh(name, signal, noise, gamma=gamma, k=k)
    if bad := (~weights.isfinite()).nonzero().flatten().tolist():
        raise ConfigError(
            f"loss_weighting = {name}: no finite weight at t = {bad[-1]}, where the "
            f"signal-to-noise ratio is {schedule.snr[bad[-1]].item():g} and the base predicts "
            f"{schedule.prediction_type}; choose another, as min-snr, or a base that predicts v"
        )
    return weights / weights.mean() if normalise else weights


def powers(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """s and n per draw, over s where eps is predicted, over n where x_0 is.  (T,), (T,) float64"""
    if isinstance(schedule, FlowSchedule):
        return (1 - schedule.sigmas).square(), schedule.sigmas.square()
    abar, one = schedule.alphas_cumprod, torch.ones_like(schedule.alphas_cumprod)
    if schedule.prediction_type == "epsilon":
        return one, 1 / schedule.snr
    if schedule.prediction_type == "sample":
        return schedule.snr, one
    return abar, 1 - abar


def weigh(name: str, s: Tensor, n: Tensor, *, gamma: float, k: float) -> Tensor:
    """h(s, n) = n w_x0(s / n), written so that s or n may be 0, n infinite.  (T,), (T,) -> (T,)"""
    if name == "uniform":
        return s
    if name == "snr+1":
        return s + n
    if name == "truncated-snr":
        return torch.maximum(s, n)
    if name == "min-snr":
        return torch.minimum(s, gamma * n)
    if name == "soft-min-snr":
        return 1 / (1 / s + 1 / (gamma * n))
    assert name == "p2", name
    return s * (k + s / n) ** -gamma


class Uncertainty(nn.Module):
    """u(t), the learned log-variance of the loss at draw t: every noise level is a task; float32.

    (Kendall et al. 2018; EDM2, Karras et al. 2024, the continuous multi-task loss.) The loss is
    L(t) / exp(u(t)) + u(t), least where u(t) = ln E[L(t)], so every timestep ends with the same
    pull on the network. u is one linear layer on fixed random Fourier features of c_noise. It is
    thrown away after training.

    Two departures: L is the loss of the network's own target, and u is 0 at the start with a bias
    of its own, so that training begins as the plain loss, where EDM2 normalises random weights. The
    features are drawn from `seed`; a state_dict restores all of u.
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
    """c_noise = ln(sigma) / 4, sigma = SNR^(-1/2) (Karras et al. 2022, Tab. 1).  (T,) float32

    A draw of pure noise or of no noise counts as the noisiest or cleanest one that has both.
    """
    c_noise = -schedule.snr.log() / 8
    finite = c_noise[c_noise.isfinite()]
    return c_noise.clamp(finite.min(), finite.max()).float()


class Reduction(nn.Module):
    """From the losses of a batch's images to one gradient: their mean, weighed, or a compromise.

    Losses are weighed before clusters of them are balanced (multitask.py). Its parameters are
    trained beside the network's, at `own_lr` where that is not the network's rate. Its state_dict
    is what a run needs to continue.
    """

    weights: Tensor | None
    stops: Tensor

    def __init__(
        self, config: FinetuneConfig, schedule: Schedule, clusters: Sequence[TimestepRange] = ()
    ) -> None:
        super().__init__()
        weights = loss_weights(
            schedule, config.loss_weighting, gamma=config.weighting_gamma, k=config.weighting_k,
            normalise=config.normalise_weighting,
        )  # fmt: skip
        weights = None if weights is None else weights.float()
        self.register_buffer("weights", weights, persistent=False)  # (T,)
        self.uncertainty = self.tasks = self.own_lr = None
        if config.loss_weighting == "uncertainty":
            self.uncertainty = Uncertainty(schedule, seed=config.seed)
        if clusters:
            from deme_cli.training.multitask import open_tasks

            self.tasks = open_tasks(config.multitask, len(clusters), every=config.multitask_every)
            self.own_lr = config.multitask_lr
            stops = torch.tensor([cluster.stop for cluster in clusters[:-1]], dtype=torch.long)
            self.register_buffer("stops", stops, persistent=False)  # (k - 1,)

    def backward(
        self, losses: Tensor, t: Tensor, parameters: Sequence[nn.Parameter], *, step: int,
        generator: torch.Generator, scale: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """Add the gradient of what is minimised to `parameters`; returns its value, a scalar.

        losses: (B,) with their graph   t: (B,). `scale` multiplies a loss before it is
        differentiated; `generator` orders what is done at random.
        """
        if self.weights is not None:
            losses = losses * self.weights[t]
        if self.tasks is not None:
            # the mean loss of each cluster, which has an image in every batch  (k,)
            clusters = torch.arange(len(self.stops) + 1, device=t.device)
            members = torch.bucketize(t, self.stops, right=True) == clusters[:, None]  # (k, B)
            # picking them would wait for a GPU
            means = torch.where(members, losses, 0.0).sum(1) / members.sum(1)
            return self.tasks.backward(
                means, parameters, step=step, generator=generator, scale=scale
            )
        total = losses.mean() if self.uncertainty is None else self.uncertainty.weigh(losses, t)
        scale(total).backward()
        return total.detach()
