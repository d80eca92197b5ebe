"""A sampler draws what diffusers draws with that scheduler, whatever the checkpoint's own is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from deme_cli.artifacts import BaseRecord
from deme_cli.config import SAMPLERS, SampleConfig
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ConfigError
from deme_cli.sampling.ensemble import single
from deme_cli.sampling.sampler import collect_images, image_seed
from deme_cli.sampling.scheduler import SCHEDULERS, build_scheduler, name_sampler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_V = {**SD, "prediction_type": "v_prediction"}
LATENT: dict[str, dict[str, Any]] = {  # what files state; SD 1.4, and more or less than it
    "stated": {
        "_class_name": "PNDMScheduler", **SD, "skip_prk_steps": True, "set_alpha_to_one": False,
        "steps_offset": 1, "clip_sample": False,
    },
    "clips": {"_class_name": "DDIMScheduler", **SD},
    "zero SNR": {
        "_class_name": "DDIMScheduler", **SD_V, "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "karras": {
        "_class_name": "DPMSolverMultistepScheduler", **SD, "use_karras_sigmas": True,
        "algorithm_type": "sde-dpmsolver++",
    },
}  # fmt: skip
PIXEL: dict[str, dict[str, Any]] = {
    "bare": {"_class_name": "DDPMScheduler"},
    "sigmoid": {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"},
    "other defaults": {"_class_name": "HeunDiscreteScheduler"},
    "x0": {
        "_class_name": "DDIMScheduler", "prediction_type": "sample", "clip_sample_range": 0.7,
        "set_alpha_to_one": False, "steps_offset": 2, "beta_schedule": "squaredcos_cap_v2",
    },
    "thresholds": {
        "_class_name": "DDPMScheduler", "num_train_timesteps": 200, "thresholding": True,
        "sample_max_value": 1.5, "variance_type": "fixed_large", "timestep_spacing": "trailing",
    },
    "betas": {
        "_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 40,
        "trained_betas": [0.002 * (1 + t) for t in range(40)], "final_sigmas_type": "sigma_min",
    },
}  # fmt: skip
CASES = [
    (name, config, sampler)
    for name, configs in (("sd", LATENT), ("pixels", PIXEL))
    for config in configs
    for sampler in (None, *SAMPLERS)
    if sampler is None or SCHEDULERS[sampler] != configs[config]["_class_name"]
]
STEPS = 4


def noise_of(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=one) for one in generators])


def with_scheduler(denoiser: Denoiser, config: dict[str, Any]) -> Denoiser:
    schedule = read_schedule(config)
    record = replace(
        denoiser.record, scheduler_config=config, num_train_timesteps=schedule.num_train_timesteps
    )
    return replace(denoiser, record=record, schedule=schedule)


def swapped(own: Any, kind: Any) -> Any:
    """kind.from_config(own.config), given the own alphas where it would have others."""
    abar = own.alphas_cumprod.double()
    try:
        scheduler = kind.from_config(own.config)
        if torch.allclose(scheduler.alphas_cumprod.double(), abar, rtol=1e-5, atol=1e-7):
            return scheduler
    except NotImplementedError:
        pass
    abar[-1] = max(abar[-1], 2**-24)  # as diffusers' Euler has it
    betas = (1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])).tolist()
    return kind.from_config(own.config, trained_betas=betas, rescale_betas_zero_snr=False)


class Wave(nn.Module):
    """A network of no time, whose outputs hang on x_t and t."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3), requires_grad=False)

    def forward(self, x_t: Tensor, t: Tensor, return_dict: bool) -> tuple[Tensor]:
        return ((self.weight * x_t + t / 300).sin(),)


@pytest.fixture(scope="session")
def of_pixels() -> Denoiser:
    network = Wave()
    record = BaseRecord(
        source="", model_config=TINY_MODEL, scheduler_config={}, num_train_timesteps=1000
    )
    return Denoiser(network, read_schedule({}), record)


@torch.no_grad()
def drawn_by_hand(network: Any, scheduler: Any, generators: list[torch.Generator]) -> np.ndarray:
    """Images as DDPMPipeline draws them, with the scales that Euler and its kin ask for."""
    x_t = noise_of(generators, (1, 8, 8)) * scheduler.init_noise_sigma
    scheduler.set_timesteps(STEPS)
    takes_noise = type(scheduler).__name__ in ("DDPMScheduler", "DDIMScheduler")
    options = {"generator": generators} if takes_noise else {}
    for t in scheduler.timesteps:
        (output,) = network(scheduler.scale_model_input(x_t, t), t, return_dict=False)
        x_t = scheduler.step(output, t, x_t, **options).prev_sample
    return ((x_t / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round().numpy()


@pytest.mark.parametrize(("name", "config", "sampler"), CASES)
def test_images_are_those_of_diffusers_with_that_scheduler(
    name: str,
    config: str,
    sampler: str | None,
    opened: Callable[..., Denoiser],
    conditioning_for: Any,
    their_pipeline: Any,
    of_pixels: Denoiser,
) -> None:
    stated = {"sd": LATENT, "pixels": PIXEL}[name][config]
    denoiser = with_scheduler(opened("sd") if name == "sd" else of_pixels, stated)
    about = {"prompts": "text:a fox", "guidance": 1.0} if name == "sd" else {}
    config = SampleConfig(num=2, steps=STEPS, seed=3, sampler=sampler, **about)
    settings = name_sampler(denoiser.record, config)
    own = getattr(diffusers, stated["_class_name"]).from_config(stated)
    kind = getattr(diffusers, SCHEDULERS[str(settings.sampler)])
    if (settings.sampler, own.config.prediction_type) == ("pndm", "sample") or (
        settings.sampler == "deis" and "algorithm_type" in stated
    ):
        with pytest.raises(ConfigError, match=f"{settings.sampler}.*does not fit|predicts x_0"):
            build_scheduler(stated, settings)
        return
    seeds = [image_seed(3, index) for index in range(2)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if name == "pixels":
        ours = collect_images(single(denoiser), settings)
        theirs = drawn_by_hand(denoiser.network, swapped(own, kind), generators)
    else:
        ours = collect_images(
            single(denoiser), settings, conditioning=conditioning_for(denoiser, settings)
        )
        parts = {**their_pipeline(denoiser).components, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**{**parts, "scheduler": own})
        if sampler:
            new = swapped(pipeline.scheduler, kind)
            pipeline = StableDiffusionPipeline(**{**parts, "scheduler": new})
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            ["a fox", "a fox"], num_inference_steps=STEPS, guidance_scale=1.0, height=16, width=16,
            latents=noise_of(generators, (4, 8, 8)), generator=generators, output_type="np",
        ).images * 255  # fmt: skip
    assert np.abs(ours - theirs).max() <= 1
