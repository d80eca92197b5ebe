"""A sampler draws what diffusers draws with that scheduler, whatever the checkpoint's own is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, collect_images
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from deme_cli.artifacts import BaseRecord
from deme_cli.config import SAMPLERS, SampleConfig
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ConfigError
from deme_cli.sampling.ensemble import single
from deme_cli.sampling.sampler import image_seed
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
# The pipeline of SD changes a config (steps_offset, clip_sample), the others go through by hand.
OF_PIPELINES = [
    *((name, None) for name in LATENT), *(("clips", name) for name in ("pndm", "dpm++", "euler"))
]  # fmt: skip
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
    takes_noise = "generator" in signature(scheduler.step).parameters
    options = {"generator": generators} if takes_noise else {}
    for t in scheduler.timesteps:
        (output,) = network(scheduler.scale_model_input(x_t, t), t, return_dict=False)
        x_t = scheduler.step(output, t, x_t, **options).prev_sample
    return ((x_t / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round().numpy()


class Drawing:
    """Two images of a denoiser that states a config: the settings, what diffusers samples with."""

    def __init__(
        self, denoiser: Denoiser, stated: dict[str, Any], sampler: str | None, **about: Any
    ):
        self.denoiser = with_scheduler(denoiser, stated)
        config = SampleConfig(num=2, steps=STEPS, seed=3, sampler=sampler, **about)
        self.settings = name_sampler(self.denoiser.record, config)
        self.own = getattr(diffusers, stated["_class_name"]).from_config(stated)
        self.kind = getattr(diffusers, SCHEDULERS[str(self.settings.sampler)])
        self.generators = [torch.Generator().manual_seed(image_seed(3, i)) for i in range(2)]

    def is_refused(self, stated: dict[str, Any]) -> bool:
        """Whether diffusers cannot draw it; checks that deme says so."""
        sampler = self.settings.sampler
        x0_by_pndm = (sampler, self.own.config.prediction_type) == ("pndm", "sample")
        if not x0_by_pndm and not (sampler == "deis" and "algorithm_type" in stated):
            return False
        with pytest.raises(ConfigError, match=f"{sampler}.*does not fit|predicts x_0"):
            build_scheduler(stated, self.settings)
        return True


@pytest.mark.parametrize("config", [*PIXEL, *LATENT])
def test_images_are_those_of_diffusers_with_every_scheduler(
    config: str, of_pixels: Denoiser
) -> None:
    stated = {**PIXEL, **LATENT}[config]
    for sampler in (None, *SAMPLERS):
        drawing = Drawing(of_pixels, stated, sampler)
        if drawing.is_refused(stated):
            continue
        ours = collect_images(single(drawing.denoiser), drawing.settings)
        scheduler = swapped(drawing.own, drawing.kind)
        theirs = drawn_by_hand(drawing.denoiser.network, scheduler, drawing.generators)
        assert np.abs(ours - theirs).max() <= 1, sampler


@pytest.mark.parametrize(("config", "sampler"), OF_PIPELINES)
def test_images_are_those_of_the_pipeline_with_that_scheduler(
    config: str, sampler: str | None, opened: Callable[..., Denoiser], conditioning_for: Any,
    their_pipeline: Any,
) -> None:  # fmt: skip
    about = {"prompts": "text:a fox", "guidance": 1.0}
    drawing = Drawing(opened("sd"), LATENT[config], sampler, **about)
    settings, generators = drawing.settings, drawing.generators
    conditioning = conditioning_for(drawing.denoiser, settings)
    ours = collect_images(single(drawing.denoiser), settings, conditioning=conditioning)
    parts = {**their_pipeline(drawing.denoiser).components, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**{**parts, "scheduler": drawing.own})
    if sampler:
        new = swapped(pipeline.scheduler, drawing.kind)
        pipeline = StableDiffusionPipeline(**{**parts, "scheduler": new})
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        ["a fox", "a fox"], num_inference_steps=STEPS, guidance_scale=1.0, height=16, width=16,
        latents=noise_of(generators, (4, 8, 8)), generator=generators, output_type="np",
    ).images * 255  # fmt: skip
    assert np.abs(ours - theirs).max() <= 1
