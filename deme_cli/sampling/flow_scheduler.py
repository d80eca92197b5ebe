"""Samplers of flow-matching models: they follow the velocity eps - x_0 from sigma = 1 to 0.

Euler takes the steps that the model's own pipeline lays; Heun the same steps, each evaluated at
both ends; DPM-Solver++ and UniPC lay their own, shifted likewise. Samplers that live on a table of
alphas do not fit. Steps are even in sigma before the shift, so `spacing` has no meaning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from deme_cli.config import SampleConfig
from deme_cli.diffusion.schedule import flow_config
from deme_cli.errors import ConfigError

FLOW_SCHEDULERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def is_flow(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler config is of a flow-matching model."""
    return flow_config(scheduler_config) is not None


def build_flow_scheduler(
    scheduler_config: Mapping[str, Any],
    config: SampleConfig,
    lay_out: Callable[[Any, int], None],
) -> Any:
    """The scheduler `config.sampler` on a flow model's schedule, its timesteps set (on the CPU).

    lay_out(scheduler, steps) sets them as the model's own pipeline does.
    Raises ConfigError where the sampler cannot do what is asked with this checkpoint.
    """
    _require_settings(config)
    import diffusers

    try:
        euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(flow_config(scheduler_config))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"this model's schedule is unusable: {error}") from error
    _require_fit(euler, config)
    if config.sampler in ("dpm++", "unipc"):
        name = FLOW_SCHEDULERS[config.sampler]
        if not scheduler_config["_class_name"].startswith("FlowMatch"):  # it has all their settings
            scheduler = getattr(diffusers, name).from_config(dict(scheduler_config))
        else:
            scheduler = _multistep(euler, config.sampler)
        lay_out(scheduler, config.steps)
        return scheduler
    lay_out(euler, config.steps)
    return euler if config.sampler == "euler" else _heun(euler, config.steps)


def _require_settings(config: SampleConfig) -> None:
    if config.sampler not in FLOW_SCHEDULERS:
        raise ConfigError(
            f"the sampler {config.sampler} does not fit a flow-matching model; choose one of "
            f"{', '.join(FLOW_SCHEDULERS)}"
        )
    if config.spacing is not None:
        raise ConfigError(
            f"spacing = {config.spacing!r}: the steps of a flow-matching model are laid in sigma "
            f"and have no spacing; leave spacing out"
        )


def _require_fit(euler: Any, config: SampleConfig) -> None:
    """What of the checkpoint's own schedule diffusers would leave out, or draw without a seed."""
    horizon = euler.config.num_train_timesteps
    if not 1 <= config.steps <= horizon:
        raise ConfigError(
            f"steps = {config.steps}: the sampler {config.sampler} takes 1 to {horizon} steps with "
            f"this model's {horizon} timesteps"
        )
    if euler.config.get("stochastic_sampling"):  # not in diffusers 0.33
        raise ConfigError(
            "this model's schedule asks for stochastic sampling, whose noise knows no seed"
        )
    shifts_by_size = euler.config.use_dynamic_shifting
    shifts_linearly = shifts_by_size and euler.config.get("time_shift_type") == "linear"
    if config.sampler == "dpm++" and shifts_linearly:
        raise ConfigError(
            "the sampler dpm++ cannot shift linearly, as this model's schedule asks; choose euler"
        )


def _multistep(euler: Any, sampler: str) -> Any:
    """DPM-Solver++ or UniPC on the flow's sigmas, with the shift of the checkpoint's schedule."""
    import diffusers

    kind = getattr(diffusers, FLOW_SCHEDULERS[sampler])
    known = inspect.signature(kind.__init__).parameters
    own = {name: value for name, value in euler.config.items() if not name.startswith("_")}
    if own["use_dynamic_shifting"] and "use_dynamic_shifting" not in known:
        raise ConfigError(
            f"the sampler {sampler} of diffusers {diffusers.__version__} cannot shift by the size "
            f"of the image; choose euler, or install a newer diffusers"
        )
    kept = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type")
    changes: dict[str, Any] = {n: own[n] for n in kept if n in own and n in known}
    changes |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    changes["flow_shift"] = own["shift"]
    if sampler == "dpm++":
        changes["algorithm_type"] = "dpmsolver++"
    elif own.get("shift_terminal"):
        changes["shift_terminal"] = own["shift_terminal"]
    scheduler = kind(**changes)
    about_size = {name: value for name, value in own.items() if name not in scheduler.config}
    scheduler.register_to_config(**about_size)  # lay_out asks it how to shift for this image size
    return scheduler


def _heun(euler: Any, steps: int) -> Any:
    """Heun on Euler's steps: evaluated at t_0, t_1, t_1, t_2, t_2 and so on.

    diffusers' own layout cannot shift by the size of the image; where nothing does, it is this one.
    """
    from diffusers import FlowMatchHeunDiscreteScheduler

    config = euler.config
    scheduler: Any = FlowMatchHeunDiscreteScheduler(config.num_train_timesteps, config.shift)
    scheduler.set_timesteps(steps)
    t, sigmas = euler.timesteps, euler.sigmas.cpu()
    scheduler.timesteps = torch.cat([t[:1], t[1:].repeat_interleave(2)])
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    return scheduler
