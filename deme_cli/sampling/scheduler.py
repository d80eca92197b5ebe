"""The sampler: a diffusers scheduler on the checkpoint's own schedule, with its steps laid out.

diffusers carries the mathematics of every sampler. Here is only which class a name stands for, what
of it the user may set, and which combinations diffusers would accept and then denoise wrongly.

Samplers of flow models follow the velocity eps - x_0 from sigma = 1 to 0: Euler takes the steps
that the model's own pipeline lays; Heun the same steps, each evaluated at both ends; DPM-Solver++
and UniPC lay their own, shifted likewise. Steps are even in sigma before the shift, so `spacing`
has no meaning, and samplers that live on a table of alphas do not fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deme_cli.artifacts import DenoiserRecord
from deme_cli.config import SampleConfig
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.schedule import flow_config, scheduler_of
from deme_cli.errors import ConfigError

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
FLOW_SCHEDULERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PNDM_WARMUP = 4  # Runge-Kutta steps before the linear multistep ones (Liu et al. 2022, section 3.3)
LayOut = Callable[[Any, int], None]  # sets a scheduler's timesteps for a number of steps


def name_sampler(record: DenoiserRecord, config: SampleConfig) -> SampleConfig:
    """The settings with their sampler named: unset, the checkpoint's own, or the next that fits.

    One that is trained by DDPM to draw pixels has DDIM, which needs a part of the steps, unless
    all are taken.
    """
    if config.sampler:
        return config
    own = record.scheduler_config.get("_class_name")
    is_short = config.steps < record.num_train_timesteps
    draws_pixels = not backbone_of(record.model_config).parts
    if flow_config(record.scheduler_config):
        named = {kind: name for name, kind in FLOW_SCHEDULERS.items()}
        sampler = named.get(str(own), "euler")
    elif config.eta or (own == "DDPMScheduler" and draws_pixels and is_short):
        sampler = "ddim"
    else:
        names = sorted(SCHEDULERS, key=lambda name: SCHEDULERS[name] != own)  # its own first
        sampler = next(_fitting(record.scheduler_config, names), "ddim")
    return replace(config, sampler=sampler)


def _fitting(scheduler_config: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    """Those of the samplers that work on the schedule."""
    for name in names:
        with suppress(ConfigError):
            _build(scheduler_config, name, {})
            yield name


def build_scheduler(
    scheduler_config: Mapping[str, Any],
    config: SampleConfig,
    *,
    lay_out: LayOut = lambda scheduler, steps: scheduler.set_timesteps(steps),
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """The scheduler `config.sampler` on the checkpoint's schedule, its timesteps set (on the CPU).

    lay_out: how the model's own pipeline sets them. changes: of the config, by that pipeline.
    Raises ConfigError where the sampler cannot do what is asked with this checkpoint, which
    diffusers would refuse late, or answer with noise.
    """
    sampler, steps = config.sampler, config.steps
    assert sampler, "name_sampler comes first"
    if config.eta and sampler != "ddim":
        raise ConfigError(
            f"eta = {config.eta:g} works with the sampler ddim alone, not with {sampler}"
        )
    changes = dict(changes or {})
    if config.spacing is not None:
        changes["timestep_spacing"] = config.spacing
    flow = flow_config(scheduler_config)
    try:
        if flow:
            scheduler = _build_flow(scheduler_config, flow, config)
        else:
            scheduler = _build(scheduler_config, sampler, changes)
    except ConfigError as error:
        if flow:
            raise
        others = ", ".join(_fitting(scheduler_config, SCHEDULERS)) or "none of the samplers does"
        raise ConfigError(f"sampler {sampler}: {error}; fitting: {others}") from error
    horizon = scheduler.config.num_train_timesteps
    lowest, highest = 1, horizon
    if sampler == "pndm" and not scheduler.config.skip_prk_steps:
        lowest, highest = PNDM_WARMUP, horizon // 2  # its half steps would be empty beyond
    if not lowest <= steps <= highest:
        raise ConfigError(
            f"steps = {steps}: the sampler {sampler} takes {lowest} to {highest} steps with this "
            f"model's {horizon} timesteps"
        )
    lay_out(scheduler, steps)
    if flow:
        return _heun(scheduler, steps) if sampler == "heun" else scheduler
    _require_timesteps(scheduler, config)
    return scheduler


def _build(scheduler_config: Mapping[str, Any], sampler: str, changes: Mapping[str, Any]) -> Any:
    import diffusers

    if str(scheduler_config.get("variance_type")).startswith("learned"):
        changes = {**changes, "variance_type": "fixed_small"}  # backbones give the prediction alone
    scheduler = scheduler_of(scheduler_config, getattr(diffusers, SCHEDULERS[sampler]), **changes)
    if sampler == "pndm" and scheduler.config.prediction_type == "sample":
        raise ConfigError("PNDMScheduler cannot use a model that predicts x_0")
    return scheduler


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
    alphas = scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()]
    if scheduler.config.prediction_type == "epsilon" and (alphas == 0).any():
        raise ConfigError(
            f"this model predicts the noise, from which no x_0 follows at a timestep without "
            f"signal (zero terminal SNR): {config.sampler} would divide by 0; try --spacing leading"
        )


def take_step(
    scheduler: Any,
    output: Tensor,
    t: float,
    x_t: Tensor,
    *,
    config: SampleConfig,
    generators: list[torch.Generator] | None,
) -> Tensor:
    """x_{t'} by one step of the sampler.  output, x_t: (B, C, H, W) float32   ->   such a tensor"""
    options: dict[str, Any] = {}
    if config.sampler in ("ddim", "ddpm", "dpm++"):
        options["generator"] = generators
    if config.sampler == "ddim":
        options["eta"] = config.eta
    return scheduler.step(output, t, x_t, return_dict=False, **options)[0]


def _build_flow(
    scheduler_config: Mapping[str, Any], flow: dict[str, Any], config: SampleConfig
) -> Any:
    """Euler with the sigmas of a flow model, which is `flow`, or a multistep solver on them.

    Raises ConfigError for what diffusers would leave out of the checkpoint's own schedule, or draw
    without a seed.
    """
    import diffusers

    sampler = str(config.sampler)
    if sampler not in FLOW_SCHEDULERS:
        raise ConfigError(
            f"the sampler {sampler} does not fit a flow-matching model; choose one of "
            f"{', '.join(FLOW_SCHEDULERS)}"
        )
    if config.spacing is not None:
        raise ConfigError(
            f"spacing = {config.spacing!r}: the steps of a flow-matching model are laid in sigma "
            f"and have no spacing; leave spacing out"
        )
    try:
        euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(flow)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"this model's schedule is unusable: {error}") from error
    if euler.config.get("stochastic_sampling"):  # not in diffusers 0.33
        raise ConfigError(
            "this model's schedule asks for stochastic sampling, whose noise knows no seed"
        )
    if sampler in ("euler", "heun"):
        return euler
    kind = getattr(diffusers, FLOW_SCHEDULERS[sampler])
    is_linear = euler.config.get("time_shift_type") == "linear"
    if sampler == "dpm++" and euler.config.use_dynamic_shifting and is_linear:
        raise ConfigError(
            "the sampler dpm++ cannot shift linearly, as this model's schedule asks; choose euler"
        )
    if scheduler_config["_class_name"].startswith("FlowMatch"):
        return _multistep(euler, kind, sampler)
    return kind.from_config(dict(scheduler_config))  # it has all their settings


def _multistep(euler: Any, kind: Any, sampler: str) -> Any:
    """DPM-Solver++ or UniPC on the flow's sigmas, with the shift of the checkpoint's schedule."""
    known = inspect.signature(kind.__init__).parameters
    own = {name: value for name, value in euler.config.items() if not name.startswith("_")}
    if own["use_dynamic_shifting"] and "use_dynamic_shifting" not in known:
        raise ConfigError(
            f"the sampler {sampler} of this diffusers cannot shift by the size of the image; "
            f"choose euler, or install a newer diffusers"
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
