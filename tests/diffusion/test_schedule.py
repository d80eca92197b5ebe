"""The forward process is diffusers' own, for every schedule and prediction type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_snr

from deme_cli.diffusion.schedule import NoiseSchedule, read_schedule
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.timesteps import TimestepRange, split_uniform

SCHEDULES: list[dict[str, Any]] = [
    {"num_train_timesteps": 1000, "beta_schedule": "linear"},
    {"num_train_timesteps": 300, "beta_schedule": "squaredcos_cap_v2"},
    {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_end": 0.012},
    {"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.4]},
]


def draw(num_train_timesteps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    t = torch.tensor([0, 1, num_train_timesteps // 2, num_train_timesteps - 1])
    return x0, eps, t


@pytest.mark.parametrize("config", SCHEDULES)
def test_noise_is_added_as_diffusers_adds_it(config: dict[str, Any]) -> None:
    schedule = read_schedule(config)
    x0, eps, t = draw(schedule.num_train_timesteps)
    expected = DDPMScheduler.from_config(config).add_noise(x0, eps, t)
    ours = schedule.add_noise(x0, eps, t)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", SCHEDULES)
def test_snr_is_that_of_diffusers(config: dict[str, Any]) -> None:
    schedule = read_schedule(config)
    everything = torch.arange(schedule.num_train_timesteps)
    expected = compute_snr(DDPMScheduler.from_config(config), everything)
    torch.testing.assert_close(schedule.snr.float(), expected, rtol=2e-4, atol=0)


def test_the_last_snr_of_the_linear_schedule_is_the_published_one() -> None:
    ratios = read_schedule({"num_train_timesteps": 1000}).snr
    assert ratios[-1].item() == pytest.approx(4.0e-5, rel=0.02)
    half = NoiseSchedule(torch.tensor([0.5]), "epsilon")
    assert half.snr.item() == pytest.approx(1.0)


def test_the_velocity_target_is_that_of_diffusers() -> None:
    config = {"num_train_timesteps": 1000, "prediction_type": "v_prediction"}
    x0, eps, t = draw(1000)
    expected = DDPMScheduler.from_config(config).get_velocity(x0, eps, t)
    torch.testing.assert_close(read_schedule(config).target(x0, eps, t), expected)


def test_noise_and_sample_targets_are_the_noise_and_the_sample() -> None:
    x0, eps, t = draw(1000)
    assert read_schedule({"prediction_type": "epsilon"}).target(x0, eps, t) is eps
    assert read_schedule({"prediction_type": "sample"}).target(x0, eps, t) is x0


def test_an_unknown_prediction_type_is_named() -> None:
    with pytest.raises(ArtifactError, match="prediction type 'flow'"):
        read_schedule({"prediction_type": "flow"})


def test_a_schedule_that_diffusers_refuses_is_named() -> None:
    with pytest.raises(ArtifactError, match="unusable scheduler config: cubic"):
        read_schedule({"beta_schedule": "cubic"}, "somewhere")


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_noise_and_times_are_those_of_diffusers_own_scheduler(shift: float) -> None:
    config = {**FLOW, "shift": shift}
    schedule = read_schedule(config)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    x0, eps, t = draw(1000)
    times = schedule.times(t)
    torch.testing.assert_close(times, scheduler.timesteps.flip(0)[t])
    expected = scheduler.scale_noise(x0, scheduler.timesteps.flip(0)[t], eps)
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), expected)
    torch.testing.assert_close(schedule.target(x0, eps, t), eps - x0)


@pytest.mark.parametrize(("shift", "num_ranges"), [(1, 4), (3, 1), (3, 7), (12, 2), (12, 4)])
def test_ranges_of_times_share_out_the_draws_of_a_flow_once(shift: float, num_ranges: int) -> None:
    schedule = read_schedule({**FLOW, "shift": shift})
    position = 0
    for span in split_uniform(num_ranges, 1000):
        drawn = schedule.indices(span)
        times = schedule.times(torch.arange(drawn.start, drawn.stop))
        assert drawn.start == position
        assert bool(((times >= span.start) & ((times < span.stop) | (times == 1000))).all())
        position = drawn.stop
    assert position == 1000


def test_a_range_without_a_time_of_the_flow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no time .* in range 0:2"):
        read_schedule({**FLOW, "shift": 12.0}).indices(TimestepRange(0, 2))


@pytest.mark.parametrize(
    "config",
    [{"prediction_type": name} for name in ("epsilon", "v_prediction", "sample")]
    + [{**FLOW, "shift": 3.0}],
)
def test_a_perfect_prediction_implies_x0(config: dict[str, Any]) -> None:
    schedule = read_schedule(config)
    x0, eps, t = (part.double() if part.is_floating_point() else part for part in draw(1000))
    x_t, target = schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t)
    for i, time in enumerate(schedule.times(t).tolist()):
        implied = schedule.x0_of(target[i : i + 1], x_t[i : i + 1], time)
        torch.testing.assert_close(implied, x0[i : i + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_between_two_timesteps_x0_is_that_of_diffusers_euler(prediction_type: str) -> None:
    config = {"prediction_type": prediction_type, "timestep_spacing": "linspace"}
    euler = EulerDiscreteScheduler.from_config(config)
    euler.set_timesteps(8)  # t = 856.29: not half-way between two timesteps
    t = euler.timesteps[1]
    assert t % 1
    x, output, _ = draw(1000)
    euler.set_begin_index(1)
    x_t = euler.scale_model_input(x, t)
    expected = euler.step(output, t, x).pred_original_sample
    found = read_schedule(config).x0_of(output, x_t, t.item())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
