"""Samplers of flow models: exact on a straight line, laid as the pipeline lays them, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from deme_cli.config import SAMPLERS, SPACINGS, SampleConfig
from deme_cli.diffusion.backbones.flux import Flux
from deme_cli.errors import ConfigError
from deme_cli.sampling.scheduler import FLOW_SCHEDULERS, build_scheduler, take_step

T = 1000
STATIC = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": T,
    "shift": 3.0,
}
# by the size of the image, with other numbers than diffusers' own
DYNAMIC = {
    **STATIC, "use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 1.4,
    "base_image_seq_len": 16, "max_image_seq_len": 64,
}  # fmt: skip
LARGE, SMALL = (4, 16, 16), (4, 8, 8)
MEAN = 0.2


@pytest.mark.parametrize("sampler", FLOW_SCHEDULERS)
def test_a_straight_line_is_followed_to_its_end_in_any_number_of_steps(sampler: str) -> None:
    """Where all data is MEAN, every path is the straight line through it."""
    for steps in (1, 2, 7):
        config = SampleConfig(sampler=sampler, steps=steps)
        scheduler = build_scheduler(STATIC, config)
        x_t = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps.tolist():
            velocity = (x_t - MEAN) / max(t / T, 1e-6)  # eps - x_0
            x_t = take_step(scheduler, velocity, t, x_t, config=config, generators=None)
        # DPM-Solver++ and UniPC tell the network whole timesteps
        within = 1e-5 if sampler in ("euler", "heun") else 5e-3
        assert torch.allclose(x_t, torch.full_like(x_t, MEAN), rtol=0, atol=within)


def laid(schedule: dict[str, Any], sampler: str, shape: Any) -> Any:
    config = SampleConfig(sampler=sampler, steps=8)
    return build_scheduler(
        schedule, config, lay_out=lambda scheduler, steps: Flux().lay_out(scheduler, steps, shape)
    )


def test_heun_takes_eulers_steps_and_its_own_where_nothing_shifts_by_size() -> None:
    ours = build_scheduler(STATIC, SampleConfig(sampler="heun", steps=8))
    own = FlowMatchHeunDiscreteScheduler(T, 3.0)
    own.set_timesteps(8)
    assert torch.allclose(ours.timesteps, own.timesteps, rtol=0, atol=1e-3)
    assert torch.allclose(ours.sigmas, own.sigmas, rtol=0, atol=1e-6)
    assert len(ours.timesteps) == 15
    euler, heun = (laid(DYNAMIC, sampler, LARGE) for sampler in ("euler", "heun"))
    assert torch.equal(heun.timesteps.unique(), euler.timesteps.unique())
    assert heun.sigmas[-1] == 0


@pytest.mark.parametrize("sampler", FLOW_SCHEDULERS)
def test_every_flow_sampler_shifts_by_the_size_of_the_image_as_the_checkpoint_says(
    sampler: str,
) -> None:
    small, large = (laid(DYNAMIC, sampler, shape) for shape in (SMALL, LARGE))
    assert (large.timesteps[1:] > small.timesteps[1:]).all()
    euler = FlowMatchEulerDiscreteScheduler.from_config(DYNAMIC)
    euler.set_timesteps(sigmas=[0.5], mu=1.4)  # that of 64 tokens
    half = large.sigmas[(large.sigmas - euler.sigmas[0]).abs().argmin()]
    assert half == pytest.approx(euler.sigmas[0].item(), abs=2e-3)


LINEAR = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *(({}, {"sampler": sampler}, f"{sampler} does not fit.*euler, heun, dpm.*, unipc")
      for sampler in set(SAMPLERS) - set(FLOW_SCHEDULERS)),
    ({}, {"spacing": SPACINGS[0]}, "spacing"),
    ({}, {"eta": 0.5}, "eta"),
    ({}, {"steps": 1001}, "1 to 1000"),
    ({"stochastic_sampling": True}, {}, "stochastic"),
    (LINEAR, {"sampler": "dpm++"}, "shift"),
    ({"time_shift_type": "sideways"}, {}, "time_shift_type"),
]  # fmt: skip


def test_what_a_flow_sampler_cannot_do_is_refused_by_name() -> None:
    for changes, settings, fault in REFUSED:
        with pytest.raises(ConfigError, match=fault):
            build_scheduler({**STATIC, **changes}, SampleConfig(**{"sampler": "euler", **settings}))
