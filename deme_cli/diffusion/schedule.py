"""The forward process: how x_0 becomes x_t, and what the network is asked to predict.

B batch, T timesteps. The schedule comes from the checkpoint's own scheduler config through
diffusers; nothing about it is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deme_cli.errors import ArtifactError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """abar_t for t = 0 .. T-1 in float64, and the prediction type of the checkpoint."""

    alphas_cumprod: Tensor  # (T,) float64, on the CPU
    prediction_type: str

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What to predict at (x_t, t): eps, x_0, or v (Salimans & Ho 2022, app. D)."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return x0
        abar = per_sample(self.alphas_cumprod, t, x0)
        return abar.sqrt() * eps - (1 - abar).sqrt() * x0


def read_schedule(scheduler_config: dict[str, Any], where: str = "the model") -> NoiseSchedule:
    """The noise schedule that a diffusers scheduler config describes.

    Raises ArtifactError on a config that diffusers refuses or on an unknown prediction type.
    """
    from diffusers import DDPMScheduler

    try:
        scheduler = DDPMScheduler.from_config(scheduler_config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: unusable scheduler config: {error}") from error
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in PREDICTIONS:
        raise ArtifactError(
            f"{where}: prediction type {prediction_type!r}; known: {', '.join(PREDICTIONS)}"
        )
    return NoiseSchedule(scheduler.alphas_cumprod.double(), prediction_type)


def per_sample(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] shaped (B, 1, ..., 1) in the dtype and on the device of `like`."""
    picked = values.to(like.device)[t].to(like.dtype)
    return picked.view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Draw x_t given x_0: sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps  (Ho et al. 2020, Eq. 4).

    x0, eps: (B, ...)   t: (B,) integer   ->   (B, ...)
    """
    abar = per_sample(alphas_cumprod, t, x0)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def snr(alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio abar / (1 - abar) per timestep."""
    return alphas_cumprod / (1 - alphas_cumprod)


def decibels(alphas_cumprod: Tensor) -> Tensor:
    """The signal-to-noise ratio per timestep in dB: 10 log10(snr)."""
    return 10 * snr(alphas_cumprod).log10()
