"""The sampler: a diffusers scheduler on the checkpoint's own schedule, with its steps laid out.

diffusers carries the mathematics of every sampler. Here is only which class a name stands for, what
of it the user may set, and which combinations diffusers would accept and then denoise wrongly. Flow
models have samplers of their own (flow_scheduler.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deme_cli.config import SampleConfig
from deme_cli.errors import ConfigError
from deme_cli.sampling.flow_scheduler import build_flow_scheduler, is_flow

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "lms": "LMSDiscreteScheduler",
}
PNDM_WARMUP = 4  # Runge-Kutta steps before the linear multistep ones (Liu et al. 2022, section 3.3)
LayOut = Callable[[Any, int], None]  # sets a scheduler's timesteps for a number of steps


def _lay_out(scheduler: Any, steps: int) -> None:
    scheduler.set_timesteps(steps)


def name_sampler(scheduler_config: Mapping[str, Any], config: SampleConfig) -> SampleConfig:
    """The settings with their sampler named: unset, it is ddim, or euler for flow models."""
    return replace(config, sampler=_sampler_of(scheduler_config, config))


def _sampler_of(scheduler_config: Mapping[str, Any], config: SampleConfig) -> str:
    return config.sampler or ("euler" if is_flow(scheduler_config) else "ddim")


def build_scheduler(
    scheduler_config: Mapping[str, Any],
    config: SampleConfig,
    *,
    lay_out: LayOut = _lay_out,
    has_latents: bool = False,
) -> Any:
    """The scheduler `config.sampler` on the checkpoint's schedule, its timesteps set (on the CPU).

    lay_out: how the model's own pipeline sets them. has_latents: x_0 is not clipped to [-1, 1]
    unless the checkpoint says so, for a VAE's latents reach beyond.
    Raises ConfigError where the sampler cannot do what is asked with this checkpoint.
    """
    config = name_sampler(scheduler_config, config)
    _require_settings(config)
    if is_flow(scheduler_config):
        return build_flow_scheduler(scheduler_config, config, lay_out)
    scheduler = _build(scheduler_config, config, has_latents)
    _require_steps(scheduler, config)
    lay_out(scheduler, config.steps)
    _require_timesteps(scheduler, config)
    return scheduler


def _build(scheduler_config: Mapping[str, Any], config: SampleConfig, has_latents: bool) -> Any:
    import diffusers

    kind = getattr(diffusers, SCHEDULERS[_sampler_of(scheduler_config, config)])
    changes: dict[str, Any] = {}
    if config.spacing is not None:
        changes["timestep_spacing"] = config.spacing
    if config.sampler == "dpm++":
        changes["algorithm_type"] = "dpmsolver++"
    try:
        complete = _complete(scheduler_config)
        if str(complete.get("variance_type")).startswith("learned"):
            complete["variance_type"] = "fixed_small"  # backbones give the prediction alone
        if has_latents and can_clip(kind):
            changes["clip_sample"] = complete.get("clip_sample", False)
        return kind.from_config(complete, **changes)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(
            f"sampler {config.sampler} does not fit this model's schedule ({error}); "
            f"try ddpm or ddim"
        ) from error


def can_clip(kind: type) -> bool:
    """Whether samplers of this class can clip x_0 in every step."""
    return "clip_sample" in inspect.signature(kind).parameters


def _complete(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler config with the defaults of the checkpoint's own class filled in.

    Left open, they would be the sampler's: HeunDiscreteScheduler takes other betas than DDPM.
    """
    import diffusers

    name = scheduler_config.get("_class_name", "DDPMScheduler")
    own = getattr(diffusers, name, diffusers.DDPMScheduler).from_config(dict(scheduler_config))
    return {key: value for key, value in own.config.items() if not key.startswith("_")}


def _require_settings(config: SampleConfig) -> None:
    if config.eta and config.sampler != "ddim":
        raise ConfigError(
            f"eta = {config.eta:g} works with the sampler ddim alone, not with {config.sampler}"
        )


def _require_steps(scheduler: Any, config: SampleConfig) -> None:
    """What diffusers would refuse late, or answer with noise."""
    horizon = scheduler.config.num_train_timesteps
    lowest, highest = 1, horizon
    if config.sampler == "pndm" and not scheduler.config.skip_prk_steps:
        lowest, highest = PNDM_WARMUP, horizon // 2  # its half steps would be empty beyond
    if not lowest <= config.steps <= highest:
        raise ConfigError(
            f"steps = {config.steps}: the sampler {config.sampler} takes {lowest} to {highest} "
            f"steps with this model's {horizon} timesteps"
        )
    if config.sampler == "pndm" and scheduler.config.prediction_type == "sample":
        raise ConfigError("the sampler pndm cannot use a model that predicts x_0; choose another")


def _require_timesteps(scheduler: Any, config: SampleConfig) -> None:
    """All timesteps lie in [0, T): an offset or rounding may push the ends out."""
    horizon = scheduler.config.num_train_timesteps
    outside = [t for t in scheduler.timesteps.tolist() if not 0 <= t <= horizon - 1]
    if outside:
        raise ConfigError(
            f"{config.steps} steps of {config.sampler} with {scheduler.config.timestep_spacing} "
            f"spacing visit timestep {outside[0]:g}, outside 0 to {horizon - 1}; "
            f"change --steps or --spacing"
        )


def uses_noise(config: SampleConfig) -> bool:
    """Whether the sampler draws fresh noise in its steps."""
    return config.sampler == "ddpm" or (config.sampler == "ddim" and config.eta > 0)


def scale_input(scheduler: Any, x_t: Tensor, t: float) -> Tensor:
    """x_t as the network takes it, where the sampler carries it on another scale (Euler, LMS)."""
    scale = getattr(scheduler, "scale_model_input", None)  # flow samplers have none
    return scale(x_t, t) if scale else x_t


def first_scale(scheduler: Any) -> float:
    """The standard deviation of the noise that the sampler starts from."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def take_step(
    scheduler: Any,
    output: Tensor,
    t: float,
    x_t: Tensor,
    *,
    config: SampleConfig,
    generators: list[torch.Generator] | None,
) -> tuple[Tensor, ...]:
    """x_{t'} by one step of the sampler, and, with most samplers, the x_0 that it implies.

    output, x_t: (B, C, H, W) float32   ->   one or two such tensors
    """
    options: dict[str, Any] = {}
    if config.sampler in ("ddim", "ddpm"):
        options["generator"] = generators
    if config.sampler == "ddim":
        options["eta"] = config.eta
    return scheduler.step(output, t, x_t, return_dict=False, **options)
