"""The samplers: right distributions, and a clear word where diffusers would go wrong in silence."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER
from diffusers import DDPMScheduler
from torch import Tensor, nn

from deme_cli.config import SAMPLERS, SPACINGS, SampleConfig
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.schedule import PREDICTIONS, read_schedule
from deme_cli.errors import ConfigError
from deme_cli.records import BaseRecord
from deme_cli.sampling.sampler import collect_images, single
from deme_cli.sampling.scheduler import SCHEDULERS, build_scheduler, take_step

MEAN, SD = 0.2, 0.15
DDPM_1000 = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "clip_sample": True}


class GaussianDenoiser(nn.Module):
    """The ideal denoiser of images whose pixels are independent N(MEAN, SD^2)."""

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))
        self.log_abar, self.prediction_type = alphas_cumprod.log(), prediction_type

    def forward(self, x_t: Tensor, t: Tensor, return_dict: bool) -> tuple[Tensor]:
        below = int(t)
        above, part = min(below + 1, len(self.log_abar) - 1), float(t) - below
        abar = (self.log_abar[below] * (1 - part) + self.log_abar[above] * part).exp()
        a, variance = abar.sqrt(), 1 - abar
        x_t = x_t.double()
        x0 = MEAN + a * SD**2 / (abar * SD**2 + variance) * (x_t - a * MEAN)
        eps = (x_t - a * x0) / variance.sqrt()
        outputs = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": a * eps - variance.sqrt() * x0,
        }
        return (outputs[self.prediction_type].float(),)


def ideal_denoiser(prediction_type: str) -> Denoiser:
    config = {**DDPM_1000, "prediction_type": prediction_type}
    schedule = read_schedule(config)
    record = BaseRecord(
        source="", model_config=TINY_MODEL, scheduler_config=config, num_train_timesteps=1000
    )
    return Denoiser(GaussianDenoiser(schedule.alphas_cumprod, prediction_type), schedule, record)


def test_every_sampler_of_the_settings_has_a_scheduler() -> None:
    assert tuple(SCHEDULERS) == SAMPLERS


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_distribution_of_an_ideal_denoiser(
    sampler: str, prediction_type: str
) -> None:
    if (sampler, prediction_type) == ("pndm", "sample"):
        pytest.skip("refused, see below")
    config = SampleConfig(num=32, sampler=sampler, steps=100)
    pixels = collect_images(single(ideal_denoiser(prediction_type)), config) / 127.5 - 1
    assert pixels.mean() == pytest.approx(MEAN, abs=0.02)
    assert pixels.std() == pytest.approx(SD, abs=0.027)


def test_what_a_config_leaves_open_is_the_checkpoints_own_default() -> None:
    ddpm = DDPMScheduler()
    for sampler in SAMPLERS:
        scheduler = build_scheduler(DDPM_1000, SampleConfig(sampler=sampler))
        assert torch.equal(scheduler.alphas_cumprod, ddpm.alphas_cumprod)
        assert scheduler.config.timestep_spacing == "leading"


def test_the_spacing_is_the_checkpoints_own_unless_it_is_given() -> None:
    own = {**TINY_SCHEDULER, "timestep_spacing": "trailing"}
    assert build_scheduler(own, SampleConfig(steps=10)).timesteps[0] == 99
    leading = build_scheduler(own, SampleConfig(steps=10, spacing="leading"))
    assert leading.timesteps.tolist() == list(range(90, -1, -10))


@pytest.mark.parametrize(
    ("changes", "has_latents", "clips"),
    [
        ({}, True, False),  # PNDM does not clip, and DDIM's own default is for pixels
        ({}, False, True),
        ({"clip_sample": True}, True, True),
        ({"clip_sample": False}, False, False),
    ],
)
def test_latents_are_clipped_only_where_the_checkpoint_says_so(
    changes: dict, has_latents: bool, clips: bool
) -> None:
    schedule = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **changes}
    scheduler = build_scheduler(schedule, SampleConfig(), has_latents=has_latents)
    assert scheduler.config.clip_sample is clips


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_a_learned_variance_is_left_alone(sampler: str) -> None:
    schedule = {**TINY_SCHEDULER, "variance_type": "learned_range"}
    config = SampleConfig(sampler=sampler, steps=10)
    scheduler = build_scheduler(schedule, config)
    x_t = torch.zeros(1, 4, 8, 8)
    generators = [torch.Generator()]
    for t in scheduler.timesteps.tolist():
        x_t, *_ = take_step(scheduler, x_t, t, x_t, config=config, generators=generators)
    assert x_t.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "dpm++", "heun"])
def test_steps_lie_within_the_timesteps_or_are_refused(sampler: str, spacing: str) -> None:
    for steps in (1, 2, 3, 4, 10, 29, 31, 50, 51, 58, 62, 97, 99, 100):
        try:
            config = SampleConfig(sampler=sampler, steps=steps, spacing=spacing)
            timesteps = build_scheduler(TINY_SCHEDULER, config).timesteps
        except ConfigError:
            continue
        assert 0 <= timesteps.min() <= timesteps.max() <= 99


@pytest.mark.parametrize(
    ("changes", "settings", "fault"),
    [
        ({}, {"sampler": "ddpm", "eta": 0.5}, "eta"),
        ({}, {"steps": 101}, "1 to 100"),
        ({}, {"sampler": "pndm", "steps": 3}, "4 to 50"),
        ({}, {"sampler": "pndm", "steps": 51}, "4 to 50"),
        ({"prediction_type": "sample"}, {"sampler": "pndm", "steps": 10}, "predicts x_0"),
        ({"beta_schedule": "sigmoid"}, {"sampler": "euler", "steps": 10}, "schedule"),
        # diffusers visits timestep -1 here: arange(100, 0, -100 / 29) runs one step too far
        ({"timestep_spacing": "trailing"}, {"steps": 29}, "timestep -1"),
        ({"steps_offset": 1}, {"steps": 100, "spacing": "leading"}, "timestep 100"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused_by_name(
    changes: dict, settings: dict, fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        build_scheduler({**TINY_SCHEDULER, **changes}, SampleConfig(**settings))
