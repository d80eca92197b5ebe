"""The forward process: how x_0 becomes x_t, and what the network is asked to predict.

B batch, T timesteps. The schedule comes from the checkpoint's own scheduler config through
diffusers; nothing about it is assumed. What a config leaves open is the default of its own class
for the alphas, of the class that samples for all else. A draw t = 0 .. T-1 is a row of the
schedule's table; what the network is told for it is its *time*: t itself in DDPM, sigma T in flow
matching, whose table is denser at high noise where the checkpoint's scheduler shifts it. Ranges are
spans of times.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.timesteps import TimestepRange

PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = "flow"
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_OF_ALPHAS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "rescale_betas_zero_snr", "prediction_type",
)  # fmt: skip
_LEAST_SIGNAL = 2.0**-24  # abar of a last timestep without signal in diffusers' Euler samplers


@dataclass(frozen=True)
class NoiseSchedule:
    """abar_t for t = 0 .. T-1 in float64, and the prediction type of the checkpoint."""

    alphas_cumprod: Tensor  # (T,) float64, on the CPU
    prediction_type: str

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Draw x_t given x_0: sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps  (Ho et al. 2020, Eq. 4).

        x0, eps: (B, ...)   t: (B,) integer   ->   (B, ...)
        """
        abar = per_sample(self.alphas_cumprod, t, x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What to predict at (x_t, t): eps, x_0, or v (Salimans & Ho 2022, app. D)."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return x0
        abar = per_sample(self.alphas_cumprod, t, x0)
        return abar.sqrt() * eps - (1 - abar).sqrt() * x0

    def x0_of(self, output: Tensor, x_t: Tensor, time: float) -> Tensor:
        """The x_0 that an output at (x_t, time) implies; the inverse of `target`.

        eps: (x_t - sqrt(1 - abar) eps) / sqrt(abar)  (Ho et al. 2020, Eq. 15)
        v: sqrt(abar) x_t - sqrt(1 - abar) v  (Salimans & Ho 2022, app. D)
        output, x_t: (B, ...)   ->   (B, ...)
        """
        if self.prediction_type == "sample":
            return output
        low, share = int(time), time % 1
        abar = float(self.alphas_cumprod[low])
        if share:  # sigma = sqrt((1 - abar) / abar) is linear between two timesteps, as in the
            sigma = self.snr[low : low + 2].rsqrt()  # Euler, Heun and LMS samplers of diffusers
            abar = float(1 / (1 + torch.lerp(sigma[0], sigma[-1], share) ** 2))
        signal, noise = abar**0.5, (1 - abar) ** 0.5
        if self.prediction_type == "epsilon":
            return (x_t - noise * output) / signal
        return signal * x_t - noise * output

    def times(self, t: Tensor) -> Tensor:
        """What the network is told for draws t: (B,) -> (B,)."""
        return t

    def indices(self, span: TimestepRange) -> TimestepRange:
        """The draws whose times lie in `span`."""
        return span

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio per draw, abar / (1 - abar).  (T,) float64"""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)


@dataclass(frozen=True)
class FlowSchedule:
    """sigma_t for t = 0 .. T-1 in float64, rising; x_t = (1 - sigma) x_0 + sigma eps.

    (Lipman et al. 2023; Esser et al. 2024, with the shift of the checkpoint's own scheduler.)
    """

    sigmas: Tensor  # (T,) float64, on the CPU
    prediction_type: str = FLOW

    @property
    def num_train_timesteps(self) -> int:
        return len(self.sigmas)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of draws t.  x0, eps: (B, ...)   t: (B,) integer   ->   (B, ...)"""
        sigma = per_sample(self.sigmas, t, x0)
        return (1 - sigma) * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The velocity eps - x_0."""
        return eps - x0

    def x0_of(self, output: Tensor, x_t: Tensor, time: float) -> Tensor:
        """The x_0 that a velocity at (x_t, time = sigma T) implies: x_t - sigma (eps - x_0).

        output, x_t: (B, ...)   ->   (B, ...)
        """
        return x_t - time / self.num_train_timesteps * output

    def times(self, t: Tensor) -> Tensor:
        """sigma T for draws t, as the scheduler's own timesteps: (B,) -> (B,) float32."""
        table = self.sigmas.float() * self.num_train_timesteps
        return table.to(t.device)[t]

    def indices(self, span: TimestepRange) -> TimestepRange:
        """The draws with start <= sigma T < stop; sigma = 1 belongs to the last range.

        Raises ConfigError where the table has no draw in `span`.
        """
        total = self.num_train_timesteps
        times = self.times(torch.arange(total))  # what the network is told, to the last bit
        edges = torch.tensor([span.start, span.stop], dtype=times.dtype)
        start, stop = torch.searchsorted(times, edges).tolist()
        stop = total if span.stop == total else stop
        if start >= stop:
            raise ConfigError(f"no time of this model's flow schedule lies in range {span}")
        return TimestepRange(start, stop)

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio per draw, ((1 - sigma) / sigma)^2.  (T,) float64"""
        return ((1 - self.sigmas) / self.sigmas).square()


Schedule = NoiseSchedule | FlowSchedule


def flow_config(scheduler_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The FlowMatchEulerDiscreteScheduler config with the sigmas of a flow model; None for others.

    Some pipelines of flow models (Wan) come with a multistep sampler, told to follow a flow.
    """
    if str(scheduler_config.get("_class_name", "")).startswith("FlowMatch"):
        return dict(scheduler_config)
    predicts_flow = scheduler_config.get("prediction_type") == "flow_prediction"
    if not (predicts_flow and scheduler_config.get("use_flow_sigmas")):
        return None
    told = {"shift": scheduler_config.get("flow_shift"), "_class_name": FLOW_SCHEDULER}
    for name in ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type"):
        told[name] = scheduler_config.get(name)
    return {name: value for name, value in told.items() if value is not None}


def complete_config(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler config states, and the defaults of its own class (DDPM's if it has none)."""
    import diffusers

    name = str(scheduler_config.get("_class_name"))
    kind = getattr(diffusers, name, diffusers.DDPMScheduler)
    defaults = {name: one.default for name, one in inspect.signature(kind).parameters.items()}
    stated = {name: value for name, value in scheduler_config.items() if not name.startswith("_")}
    return {"_class_name": kind.__name__, **defaults, **stated}


def alphas_config(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the alphas are made of and what is predicted, with the defaults of the config's class.

    Left to the class that samples, they would be others: HeunDiscreteScheduler has its own betas.
    """
    complete = complete_config(scheduler_config)
    return {name: complete[name] for name in _OF_ALPHAS if name in complete}


def scheduler_of(scheduler_config: Mapping[str, Any], kind: Any, **changes: Any) -> Any:
    """kind.from_config(scheduler_config) of diffusers, with `changes`, on the model's own alphas.

    A class that ignores or refuses a part of what makes them is given them as trained betas; one
    that divides by the signal, the least one where there is none. Raises ConfigError where it still
    works on others.
    """
    own = alphas_config(scheduler_config)
    schedule = read_schedule(scheduler_config)
    assert isinstance(schedule, NoiseSchedule), "flows have samplers of their own"
    alphas = schedule.alphas_cumprod
    divides = kind.__name__ not in ("DDPMScheduler", "DDIMScheduler")
    seen = alphas.masked_fill(alphas == 0, _LEAST_SIGNAL if divides else 0.0)
    betas = 1 - seen / torch.cat([seen.new_ones(1), seen[:-1]])
    as_betas = {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    reason: object = ""
    for given in (own, {**own, **as_betas}):
        try:
            scheduler = kind.from_config({**scheduler_config, **given, **changes})
        except (NotImplementedError, TypeError, ValueError) as error:
            reason = error
            continue
        found = scheduler.alphas_cumprod.double()
        if found.shape == seen.shape and torch.allclose(found, seen, rtol=1e-4, atol=1e-9):
            return scheduler
        reason = "it works on other alphas"
    raise ConfigError(f"{kind.__name__} does not fit this model's schedule: {reason}")


def read_schedule(scheduler_config: Mapping[str, Any], where: str = "the model") -> Schedule:
    """The schedule that a diffusers scheduler config describes.

    Raises ArtifactError on a config that diffusers refuses or on an unknown prediction type.
    """
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    flow = flow_config(scheduler_config)
    scheduler: Any
    try:
        scheduler = (
            FlowMatchEulerDiscreteScheduler.from_config(flow)
            if flow
            else DDPMScheduler(**alphas_config(scheduler_config))
        )
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: unusable scheduler config: {error}") from error
    if flow:
        return FlowSchedule(scheduler.sigmas.double().flip(0))
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in PREDICTIONS:
        raise ArtifactError(
            f"{where}: prediction type {prediction_type!r}; known: {', '.join(PREDICTIONS)}"
        )
    alphas, horizon = scheduler.alphas_cumprod.double(), scheduler.config.num_train_timesteps
    if len(alphas) != horizon:
        raise ArtifactError(f"{where}: {len(alphas)} trained betas for {horizon} timesteps")
    return NoiseSchedule(alphas, prediction_type)


def per_sample(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] shaped (B, 1, ..., 1) in the dtype and on the device of `like`."""
    picked = values.to(like.device)[t].to(like.dtype)
    return picked.view(-1, *[1] * (like.ndim - 1))
