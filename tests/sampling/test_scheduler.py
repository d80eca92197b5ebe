"""The samplers: right distributions, and a clear word where diffusers would go wrong in silence."""

from __future__ import annotations

from contextlib import suppress
from itertools import cycle, product
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER
from diffusers import DDPMScheduler

from deme_cli.artifacts import BaseRecord
from deme_cli.config import SAMPLERS, SPACINGS, SampleConfig
from deme_cli.errors import ConfigError
from deme_cli.sampling.scheduler import SCHEDULERS, build_scheduler, name_sampler, take_step


def test_every_sampler_of_the_settings_has_a_scheduler() -> None:
    assert tuple(SCHEDULERS) == SAMPLERS


# What a config may state, one key at a time; the alphas hang on the first eight.
KEYS: list[dict[str, Any]] = [
    {"trained_betas": [0.001 * (1 + t) for t in range(100)]},
    {"rescale_betas_zero_snr": True},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_end": 0.02},
    *({"beta_schedule": name} for name in ("scaled_linear", "squaredcos_cap_v2", "sigmoid")),
    {"beta_start": 0.002, "beta_end": 0.1},
    {"num_train_timesteps": 60},
    {"prediction_type": "sample"},
    {"timestep_spacing": "trailing"},
    {"steps_offset": 1},
    {"set_alpha_to_one": False},
    {"clip_sample": False},
    {"clip_sample_range": 0.5},
    {"thresholding": True},
    {"skip_prk_steps": True},
    {"variance_type": "learned_range"},
    {"solver_order": 3},
    *({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")),
    {"final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver++"},
    {"euler_at_final": True},
    {"interpolation_type": "log_linear"},
    {"unheard_of": 3},
]
CLASSES = ["DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"]


def test_every_sampler_works_on_the_alphas_that_are_trained_on_or_is_refused() -> None:
    """Whatever class states a key; each of them in turn."""
    refusals: list[tuple[str, str]] = []
    for (changes, name), sampler in product(zip(KEYS, cycle(CLASSES), strict=False), SAMPLERS):
        config = {**TINY_SCHEDULER, "_class_name": name, **changes}
        try:
            scheduler = build_scheduler(config, SampleConfig(sampler=sampler, steps=10))
        except ConfigError as error:
            refusals.append((sampler, str(error)))
            continue
        own = DDPMScheduler.from_config({**TINY_SCHEDULER, **changes}).alphas_cumprod
        torch.testing.assert_close(scheduler.alphas_cumprod, own, rtol=1e-5, atol=1e-7)
        assert scheduler.config.prediction_type == config["prediction_type"]
        assert torch.as_tensor(getattr(scheduler, "sigmas", 0.0)).isfinite().all()
    assert all(sampler in refusal for sampler, refusal in refusals)


def named(own: str, *, is_latent: bool = False, config: Any = (), **settings: Any) -> str | None:
    latent = {"_class_name": "UNet2DConditionModel", "sample_size": 8}
    model = latent if is_latent else TINY_MODEL
    record = BaseRecord(
        source="", model_config=model, scheduler_config={"_class_name": own, **dict(config)},
        num_train_timesteps=1000,
    )  # fmt: skip
    return name_sampler(record, SampleConfig(**settings)).sampler


def test_the_sampler_is_the_checkpoints_own_or_the_next_that_fits() -> None:
    for sampler, own in SCHEDULERS.items():
        assert named(own, is_latent=True) == sampler
        assert named(own) == ("ddim" if sampler == "ddpm" else sampler)
    assert named("DDPMScheduler", steps=1000) == "ddpm"
    assert named("PNDMScheduler", is_latent=True, eta=0.5) == "ddim"
    assert named("PNDMScheduler", config={"prediction_type": "sample"}) == "ddim"
    assert named("LCMScheduler", is_latent=True) == "ddim"
    assert named("DDIMScheduler", sampler="lms") == "lms"
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    assert named("UniPCMultistepScheduler", config=flow) == "unipc"
    assert named("FlowMatchEulerDiscreteScheduler") == "euler"
    assert named("DEISMultistepScheduler", config=flow) == "euler"


def test_the_spacing_is_the_checkpoints_own_unless_it_is_given() -> None:
    own = {**TINY_SCHEDULER, "timestep_spacing": "trailing"}
    assert build_scheduler(own, SampleConfig(sampler="ddim", steps=10)).timesteps[0] == 99
    leading = build_scheduler(own, SampleConfig(sampler="ddim", steps=10, spacing="leading"))
    assert leading.timesteps.tolist() == list(range(90, -1, -10))


def test_a_learned_variance_is_left_alone() -> None:
    config = SampleConfig(sampler="ddpm", steps=10)
    scheduler = build_scheduler({**TINY_SCHEDULER, "variance_type": "learned_range"}, config)
    x_t = torch.zeros(1, 4, 8, 8)
    for t in scheduler.timesteps.tolist():
        x_t = take_step(scheduler, x_t, t, x_t, config=config, generators=[torch.Generator()])
    assert x_t.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "dpm++", "heun"])
def test_steps_lie_within_the_timesteps_or_are_refused(sampler: str) -> None:
    for spacing, steps in product(SPACINGS, (1, 2, 3, 4, 10, 29, 31, 50, 51, 58, 97, 99, 100)):
        with suppress(ConfigError):
            config = SampleConfig(sampler=sampler, steps=steps, spacing=spacing)
            timesteps = build_scheduler(TINY_SCHEDULER, config).timesteps
            assert 0 <= timesteps.min() <= timesteps.max() <= 99


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"sampler": "ddpm", "eta": 0.5}, "eta"),
    ({}, {"steps": 101}, "1 to 100"),
    ({}, {"sampler": "pndm", "steps": 3}, "4 to 50"),
    ({}, {"sampler": "pndm", "steps": 51}, "4 to 50"),
    ({"prediction_type": "sample"}, {"sampler": "pndm", "steps": 10}, "predicts x_0"),
    ({"use_karras_sigmas": True, "use_beta_sigmas": True}, {"sampler": "heun"}, "ddim, ddpm"),
    (ZERO_SNR, {}, "without signal"),
    # diffusers visits timestep -1 here: arange(100, 0, -100 / 29) runs one step too far
    ({"timestep_spacing": "trailing"}, {"steps": 29}, "timestep -1"),
    ({"steps_offset": 1}, {"steps": 100, "spacing": "leading"}, "timestep 100"),
]


def test_what_a_sampler_cannot_do_is_refused_by_name() -> None:
    for changes, settings, fault in REFUSED:
        with pytest.raises(ConfigError, match=fault):
            build_scheduler(
                {**TINY_SCHEDULER, **changes}, SampleConfig(**{"sampler": "ddim", **settings})
            )
