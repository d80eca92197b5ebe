"""The table of a sampler: its rows do what diffusers' steps do, at every step and for any input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from deme_cli.config import SAMPLERS, SPACINGS, SampleConfig
from deme_cli.diffusion.schedule import PREDICTIONS
from deme_cli.sampling.scheduler import build_scheduler, scale_input, take_step, uses_noise
from deme_cli.sampling.step_table import TABLED, advance, tabulate

DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
SHAPE = (3, 2, 4, 4)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]


def require_same_steps(scheduler: Any, config: SampleConfig) -> None:
    """Each step, from inputs of every size, those that are clipped among them."""
    table = tabulate(scheduler, config)
    assert table is not None
    assert len(table) == len(scheduler.timesteps)
    scheduler = copy.deepcopy(scheduler)
    random = torch.Generator().manual_seed(0)
    for row, t in zip(table, scheduler.timesteps.tolist(), strict=True):
        x_t, output = (_spread(random) for _ in range(2))
        torch.testing.assert_close(scale_input(scheduler, x_t, t), row[0] * x_t)
        noise = None
        if uses_noise(config):
            noise = torch.stack([torch.randn(SHAPE[1:], generator=g) for g in generators()])
        found = advance(row, x_t, output, noise)
        wanted, *_ = take_step(scheduler, output, t, x_t, config=config, generators=generators())
        size = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * size)


def _spread(random: torch.Generator) -> Tensor:
    """Numbers from hundredths to tens."""
    sizes = torch.tensor([0.01, 1.0, 30.0]).view(-1, 1, 1, 1)
    return sizes * torch.randn(SHAPE, generator=random)


@pytest.mark.parametrize("clip", [None, 1.0, 1.5])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0), ("ddim", 0.6), ("ddpm", 0)])
def test_rows_are_the_steps_of_ddim_and_ddpm(
    sampler: str, eta: float, prediction_type: str, clip: float | None
) -> None:
    model = {**DDPM, "prediction_type": prediction_type, "clip_sample": clip is not None}
    model["clip_sample_range"] = clip or 1.0
    for spacing in SPACINGS:
        config = SampleConfig(sampler=sampler, eta=eta, steps=23, spacing=spacing)
        require_same_steps(build_scheduler(model, config), config)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "fixed_small_log"])
def test_rows_have_the_variance_of_the_checkpoint(variance: str) -> None:
    config = SampleConfig(sampler="ddpm", steps=40)
    require_same_steps(build_scheduler({**DDPM, "variance_type": variance}, config), config)


@pytest.mark.parametrize("model", [*({**DDPM, "prediction_type": p} for p in PREDICTIONS), FLOW])
def test_rows_are_the_steps_of_euler(model: dict) -> None:
    config = SampleConfig(sampler="euler", steps=17)
    require_same_steps(build_scheduler(model, config), config)


def test_samplers_with_a_memory_have_no_table() -> None:
    for sampler in SAMPLERS:
        config = SampleConfig(sampler=sampler, steps=10)
        table = tabulate(build_scheduler(DDPM, config), config)
        assert (table is not None) == (sampler in TABLED)


def test_there_is_no_table_where_a_step_is_not_linear_or_has_no_signal() -> None:
    config = SampleConfig(sampler="ddim", steps=10, spacing="trailing")
    plain = {**DDPM, "_class_name": "DDIMScheduler"}
    for changes in ({"thresholding": True}, {"rescale_betas_zero_snr": True}):
        assert tabulate(build_scheduler({**plain, **changes}, config), config) is None
