"""A batch of images under way from noise to x_0, step by step.

B batch, C channels, h x w pixels of latents.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from deme_cli.config import SampleConfig
from deme_cli.diffusion.conditions import Conditions, select, to
from deme_cli.sampling.compiled import Step
from deme_cli.sampling.noise import image_seed
from deme_cli.sampling.scene import Scene
from deme_cli.sampling.scheduler import first_scale, scale_input, take_step, uses_noise


@dataclass(frozen=True)
class Timestep:
    """A timestep of the step list: t for the scheduler, and on the device for the network."""

    index: int
    t: float
    on_device: Tensor  # ()


@dataclass
class Batch:
    """`num` images under way, with what their scheduler remembers.

    Up to B, the last one comes again and again: a compiled step takes batches of one size.
    """

    start: int
    num: int
    generators: list[torch.Generator] | None  # kept where the sampler draws noise in its steps
    scheduler: Any
    x_t: Tensor  # (B, C, h, w) float32
    told: Conditions  # batch B, or 2B for guidance
    guidance: float | None  # where conditions come in pairs


@torch.inference_mode()
def draw_batch(
    span: range, scene: Scene, like: Tensor, *, scheduler: Any, config: SampleConfig, size: int
) -> Batch:
    """The images of `span` at the first timestep, in a batch of at least `size`.

    Noise comes from each image's own generator. like: of the network's device and dtype.
    """
    num = len(span)
    places = [*range(num), *[num - 1] * (size - num)]
    seeds = [image_seed(config.seed, span[place]) for place in places]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    shape = (len(places), *scene.latent_shape)
    noise = randn_tensor(shape, generator=generators, device=like.device)
    halves = [*places, *(num + place for place in places)] if scene.is_paired else places
    told = select(scene.conditions(span.start, span.stop), halves)
    return Batch(
        start=span.start,
        num=num,
        generators=generators if uses_noise(scheduler, config) else None,
        scheduler=copy.deepcopy(scheduler),
        x_t=noise * first_scale(scheduler),
        told=to(told, like.device, like.dtype),
        guidance=scene.guidance if scene.is_paired else None,
    )


@torch.inference_mode()
def denoise(batch: Batch, step: Step, at: Timestep, config: SampleConfig) -> tuple[Tensor, Tensor]:
    """Advance `batch` by one step; returns x_t on the network's scale and what the network said.

    The network works in its own dtype, the sampler in float32.  -> two of (num, C, h, w) float32
    """
    x_t = scale_input(batch.scheduler, batch.x_t, at.t)
    output = step(x_t, at.on_device, batch.told, scale=batch.guidance)
    batch.x_t, *_ = take_step(
        batch.scheduler, output, at.t, batch.x_t, config=config, generators=batch.generators
    )
    return x_t[: batch.num], output[: batch.num]
