"""How much each timestep counts in the loss: the published weightings, for what a network predicts.

T timesteps, B batch. x_t carries signal of power s and noise of power n (abar and 1 - abar;
(1 - sigma)^2 and sigma^2 in flow matching), and SNR = s / n. Papers weigh the loss of x_0:

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

Learned weights are in `uncertainty.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deme_cli.diffusion.schedule import FlowSchedule, Schedule
from deme_cli.errors import ConfigError

GAMMA = {"min-snr": 5.0, "soft-min-snr": 5.0, "p2": 1.0}  # as published, see above
NOT_IN_A_TABLE = ("none", "uncertainty")


def loss_weights(
    schedule: Schedule,
    name: str,
    *,
    gamma: float | None = None,
    k: float = 1.0,
    normalise: bool = False,
) -> Tensor | None:
    """Weight per draw on the loss of the network's own target.  (T,) float64

    None for "none" (the plain loss) and "uncertainty". `normalise` makes the mean over all T
    draws 1. Raises ConfigError where a weight is not finite.
    """
    if name in NOT_IN_A_TABLE:
        return None
    signal, noise = powers(schedule)
    gamma = GAMMA.get(name, 1.0) if gamma is None else gamma
    weights = weigh(name, signal, noise, gamma=gamma, k=k)
    require_finite(weights, name, schedule)
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


def require_finite(weights: Tensor, name: str, schedule: Schedule) -> None:
    """Raise ConfigError that names the last t whose weight is infinite or undefined."""
    bad = (~weights.isfinite()).nonzero().flatten().tolist()
    if bad:
        t = bad[-1]
        raise ConfigError(
            f"loss_weighting = {name}: no finite weight at t = {t}, where the signal-to-noise "
            f"ratio is {schedule.snr[t].item():g} and the base predicts "
            f"{schedule.prediction_type}; choose another, such as min-snr, or a base that "
            "predicts v"
        )
