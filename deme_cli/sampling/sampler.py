"""Draw images from one denoiser or from an ensemble of experts, range by range.

B batch, C channels, h x w pixels of latents, H x W of images. Image i starts from noise of its own
generator, and fresh noise in stochastic samplers comes from the same one, so it depends on (seed,
i) and its conditions alone. Expert i denoises the timesteps of its range, whatever their place in
the step list (Eq. 7); samplers that evaluate twice per step ask for the expert of each evaluation.
A chunk of batches passes through one expert after another: each forward is paid once, so an
ensemble costs what one model costs, and an expert can leave memory before the next one comes. Of
several processes each draws its share of the batches, whole ones.

Writing images anywhere is not done here.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deme_cli.config import SampleConfig
from deme_cli.diffusion.conditions import Conditions, select, to
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.threads import fitting_number, using_threads
from deme_cli.distributed import ALONE, World
from deme_cli.errors import NumericsError
from deme_cli.sampling.compiled import UNCOMPILED, CompiledSteps, HeldExperts, Step
from deme_cli.sampling.conditioning import Conditioning, conditioning_of
from deme_cli.sampling.ensemble import SamplingExpert
from deme_cli.sampling.scheduler import (
    first_scale,
    name_sampler,
    scale_input,
    take_step,
    uses_noise,
)
from deme_cli.sampling.shares import Shares
from deme_cli.timesteps import TimestepRange, route

Timestep = tuple[float, Tensor]  # t for the scheduler, and () on the device for the network
CHUNK_BYTES = 1 << 30  # state of the images that pass through the experts together
DECODED_PIXELS = 1 << 20  # images decoded together: a VAE takes some GiB for this many pixels
_STATE_TENSORS = 6  # x_t, and at most five more that a multistep scheduler remembers
_GENERATOR_BYTES = 5_100  # a Mersenne twister as torch keeps it


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index`: 63 bits, so that it fits an int64."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """A generator for each image, so that its noise depends on no other image."""
    return [torch.Generator().manual_seed(image_seed(seed, index)) for index in indices]


def noise_of(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (B, *shape), that of each image from its own generator."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def seeded_noise(seed: int, shape: tuple[int, int, int], indices: Sequence[int]) -> Tensor:
    """That of images `indices` of a seed: (B, *shape)."""
    return noise_of(image_generators(seed, indices), shape)


@dataclass(frozen=True, slots=True)
class StepProgress:
    """Forwards done of all, counted in images: `done / total` is the share of the work.

    Images before `first` count as done, so that a resumed run goes on where it stopped.
    """

    done: int
    total: int


@dataclass(frozen=True)
class ImageBatch:
    """Finished images start .. start + B - 1."""

    start: int
    images: np.ndarray  # uint8 (B, H, W, C)


def collect_images(
    experts: Sequence[SamplingExpert],
    config: SampleConfig,
    *,
    conditioning: Conditioning | None = None,
    hold_one: bool = False,
) -> np.ndarray:
    """All images as one uint8 array (n, H, W, C)."""
    records = sample_images(experts, config, conditioning=conditioning, hold_one=hold_one)
    return np.concatenate([record.images for record in records if isinstance(record, ImageBatch)])


def sample_images(
    experts: Sequence[SamplingExpert],
    config: SampleConfig,
    *,
    conditioning: Conditioning | None = None,
    hold_one: bool = False,
    first: int = 0,
    world: World = ALONE,
    compiled: CompiledSteps = UNCOMPILED,
) -> Iterator[StepProgress | ImageBatch]:
    """Draw the images first .. num - 1 of `config.seed`, in order.

    Yields a StepProgress after every forward and an ImageBatch for every finished batch. The
    experts' ranges must cover [0, T) once; `hold_one` frees each expert before the next is loaded.
    Without a conditioning, `config` and the model's own record make it. A process of `world` draws
    its share of the batches, talking to nobody, and counts no others. `compiled`: what steps go
    through; where it is on, in batches of one size, and images change by rounding.
    Raises ConfigError if the sampler does not fit the model, ArtifactError if the frozen parts
    around it are others than its base's, NumericsError on non-finite images.
    """
    held = HeldExperts(experts, hold_one=hold_one, compiled=compiled)
    ranges = [expert.range for expert in experts]
    model = held.take(ranges.index(max(ranges))).denoiser  # the one that sees the noise first
    about = conditioning or conditioning_of(model, config)
    assert config.num in (None, about.num), "the conditioning is of another number of images"
    config = name_sampler(model.record, config)
    scheduler = about.scheduler(model.record, config)
    about.load()
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    threads, is_compiled = _fitting_threads(model, about, config), compiled.is_on(model.device)
    del model  # so that `held` alone keeps it
    runs = _plan_runs(scheduler.timesteps, ranges, like.device)
    num, num_steps = about.num, len(scheduler.timesteps)
    done, total = first * num_steps, num * num_steps
    size = min(config.batch_size, num - first) if is_compiled else 0
    own = Shares(num, config.batch_size, first, world).own
    chunk = _batches_per_chunk(about, config) if hold_one and len(experts) > 1 else 1
    for begin in range(0, len(own), chunk):
        batches = [
            draw_batch(span, about, like, scheduler=scheduler, config=config, size=size)
            for span in own[begin : begin + chunk]
        ]
        for run in runs:
            expert, steps = run
            for batch in batches:
                for at in steps:
                    with using_threads(threads):
                        denoise(batch, held.take(expert), at, config)
                    done += batch.num
                    yield StepProgress(done, total)
                if run is runs[-1]:
                    latents = batch.x_t[: batch.num]
                    images = finish_images(latents, about, config, first=batch.start)
                    yield ImageBatch(batch.start, images)


def _plan_runs(
    timesteps: Tensor, ranges: Sequence[TimestepRange], device: torch.device
) -> list[tuple[int, list[Timestep]]]:
    """The steps in the scheduler's order, cut where another expert takes over, with its index."""
    times = zip(timesteps.tolist(), timesteps.to(device), strict=True)
    grouped = groupby(times, key=lambda at: route(at[0], ranges))
    return [(expert, list(group)) for expert, group in grouped]


def _fitting_threads(denoiser: Denoiser, about: Conditioning, config: SampleConfig) -> int:
    """Threads for the forwards of a batch, which has every image twice for a guidance pair."""

    def inputs() -> tuple[Tensor, Conditions]:
        num = 2 if about.is_paired else 1
        x_t = torch.zeros(num, *about.latent_shape, dtype=denoiser.dtype)
        return x_t, to(about.conditions(0, 1), x_t.device, denoiser.dtype)

    return fitting_number(denoiser.network, inputs, num_images=config.batch_size)


@torch.inference_mode()
def _batches_per_chunk(about: Conditioning, config: SampleConfig) -> int:
    """Batches whose state stays within CHUNK_BYTES, at least one."""
    conditions = about.conditions(0, 1).values()
    per_image = 4 * _STATE_TENSORS * math.prod(about.latent_shape) + _GENERATOR_BYTES
    per_image += sum(value.numel() * value.element_size() for value in conditions)
    return max(1, CHUNK_BYTES // per_image // config.batch_size)


@dataclass
class Batch:
    """`num` images under way from noise to x_0, with what their scheduler remembers.

    Up to B, the last one comes again and again: a compiled step takes batches of one size.
    """

    start: int
    num: int
    generators: list[torch.Generator] | None  # kept where the sampler draws noise in its steps
    scheduler: Any
    x_t: Tensor  # (B, C, h, w) float32
    conditions: Conditions  # batch B, or 2B for guidance
    guidance: float | None  # where conditions come in pairs


@torch.inference_mode()
def draw_batch(
    span: range, about: Conditioning, like: Tensor, *, scheduler: Any, config: SampleConfig,
    size: int,
) -> Batch:  # fmt: skip
    """The images of `span` at the first timestep, in a batch of at least `size`.

    like: of the network's device and dtype.
    """
    num = len(span)
    rows = [*range(num), *[num - 1] * (size - num)]
    generators = image_generators(config.seed, [span[row] for row in rows])
    noise = noise_of(generators, about.latent_shape).to(like.device)
    halves = [*rows, *(num + row for row in rows)] if about.is_paired else rows
    conditions = select(about.conditions(span.start, span.stop), halves)
    return Batch(
        start=span.start,
        num=num,
        generators=generators if uses_noise(scheduler, config) else None,
        scheduler=copy.deepcopy(scheduler),
        x_t=noise * first_scale(scheduler),
        conditions=to(conditions, like.device, like.dtype),
        guidance=about.guidance if about.is_paired else None,
    )


@torch.inference_mode()
def denoise(batch: Batch, step: Step, at: Timestep, config: SampleConfig) -> None:
    """Advance `batch` by one step. The network works in its own dtype, the sampler in float32."""
    t, on_device = at
    x_t = scale_input(batch.scheduler, batch.x_t, t)
    output = step(x_t, on_device, batch.conditions, scale=batch.guidance)
    batch.x_t = take_step(
        batch.scheduler, output, t, batch.x_t, config=config, generators=batch.generators
    )


@torch.inference_mode()
def finish_images(
    x0: Tensor, about: Conditioning, config: SampleConfig, *, first: int
) -> np.ndarray:
    """Images first .. first + B - 1 of x_0 (B, C, h, w): decoded, in 8 bits, resized.

    ->  uint8 (B, H, W, C).  Raises NumericsError if one is not finite.
    """
    at_once = max(1, DECODED_PIXELS // math.prod(about.drawn_shape[1:]))
    images = []
    for part in x0.split(at_once):
        decoded = about.companions.decode(part)
        if not torch.isfinite(decoded).all():
            raise NumericsError(
                f"images {first} to {first + len(x0) - 1} are not finite after {config.steps} "
                f"steps of {config.sampler}; the weights are broken, or --dtype is too narrow for "
                f"them"
            )
        levels = (decoded / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)  # as diffusers
        images.append(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    return resize_images(np.concatenate(images), about.resize)


def resize_images(images: np.ndarray, size: int | None) -> np.ndarray:
    """uint8 (B, H, W, C) -> (B, size, size, C) by Pillow's bicubic filter, as BK-SDM does.

    (Kim et al. 2023, generate.py.) C is 1 or 3.
    """
    if size is None:
        return images
    channels = images.shape[3]
    pictures = [Image.fromarray(image[..., 0] if channels == 1 else image) for image in images]
    small = [np.asarray(p.resize((size, size), Image.Resampling.BICUBIC)) for p in pictures]
    return np.stack(small).reshape(-1, size, size, channels)
