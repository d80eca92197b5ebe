"""Draw images from one denoiser or from an ensemble of experts, range by range.

B batch, C channels, h x w pixels of latents, H x W of images. Image i starts from noise of its own
generator, and fresh noise in stochastic samplers comes from the same one, so it depends on (seed,
i) and its subject alone. Expert i denoises the timesteps of its range, whatever their place in the
step list (Eq. 7); samplers that evaluate twice per step ask for the expert of each evaluation. A
chunk of batches passes through one expert after another: each forward is paid once, so an ensemble
costs what one model costs, and an expert can leave memory before the next one comes. Of several
processes each draws its share of the batches, whole ones.

Writing images anywhere is not done here.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from deme_cli.config import SampleConfig
from deme_cli.diffusion.conditions import Conditions, to
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.threads import fitting_number, using_threads
from deme_cli.processes import ALONE, World
from deme_cli.sampling.compiled import UNCOMPILED, CompiledNetworks
from deme_cli.sampling.finish import finish_images
from deme_cli.sampling.guidance import predict_guided
from deme_cli.sampling.held_experts import HeldExperts
from deme_cli.sampling.scene import Scene, scene_of
from deme_cli.sampling.scheduler import (
    build_scheduler,
    first_scale,
    name_sampler,
    scale_input,
    take_step,
    uses_noise,
)
from deme_cli.sampling.shares import Shares
from deme_cli.timesteps import TimestepRange, route

CHUNK_BYTES = 1 << 30  # state of the images that pass through the experts together
_STATE_TENSORS = 6  # x_t, and at most five more that a multistep scheduler remembers
_GENERATOR_BYTES = 5_100  # a Mersenne twister as torch keeps it


@dataclass(frozen=True)
class SamplingExpert:
    """Who denoises `range`. `load` is called once, or once per chunk when holding one at a time."""

    range: TimestepRange
    load: Callable[[], Denoiser]


@dataclass(frozen=True, slots=True)
class StepProgress:
    """Forwards done of all, counted in images: `done / total` is the share of the work.

    Images before `first` count as done, so that a resumed run goes on where it stopped.
    """

    done: int
    total: int


@dataclass(frozen=True)
class Forward:
    """What was asked of expert `expert` at step `step` of the step list, and what it said.

    Of images start .. start + B - 1, at time t. x_t is on the network's scale, before it is
    narrowed to the network's dtype; the output is guided where there is a scale.
    """

    start: int
    step: int
    t: float
    expert: int
    x_t: Tensor  # (B, C, h, w) float32
    output: Tensor  # (B, C, h, w) float32


@dataclass(frozen=True)
class ImageBatch:
    """Finished images start .. start + B - 1."""

    start: int
    images: np.ndarray  # uint8 (B, H, W, C)


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index`: 63 bits, so that it fits an int64."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_noise(seed: int, shape: tuple[int, int, int], indices: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), that of each index from its own seed."""
    generator = torch.Generator()
    seeds = [image_seed(seed, index) for index in indices]
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(s)) for s in seeds])


def single(denoiser: Denoiser) -> list[SamplingExpert]:
    """One denoiser as an ensemble of one, for [0, T)."""
    whole = TimestepRange(0, denoiser.schedule.num_train_timesteps)
    return [SamplingExpert(whole, lambda: denoiser)]


def collect_images(
    experts: Sequence[SamplingExpert],
    config: SampleConfig,
    *,
    scene: Scene | None = None,
    hold_one: bool = False,
) -> np.ndarray:
    """All images as one uint8 array (n, H, W, C)."""
    records = sample_images(experts, config, scene=scene, hold_one=hold_one)
    return np.concatenate([record.images for record in records if isinstance(record, ImageBatch)])


def sample_images(
    experts: Sequence[SamplingExpert],
    config: SampleConfig,
    *,
    scene: Scene | None = None,
    hold_one: bool = False,
    first: int = 0,
    watch: Callable[[Forward], None] | None = None,
    world: World = ALONE,
    compiled: CompiledNetworks = UNCOMPILED,
) -> Iterator[StepProgress | ImageBatch]:
    """Draw the images first .. scene.num - 1 of `config.seed`, in order.

    Yields a StepProgress after every forward and an ImageBatch for every finished batch. The
    experts' ranges must cover [0, T) once; `hold_one` frees each expert before the next is loaded.
    Without a scene, `config` and the model's own record make it. `watch` is shown every forward.
    A process of `world` draws its share of the batches, talking to nobody, and counts no others.
    `compiled`: what forwards go through; where it is on, in batches of one size, and images change
    by rounding.
    Raises ConfigError if the sampler does not fit the model, ArtifactError if the frozen parts
    around it are others than its base's, NumericsError on non-finite images.
    """
    held = HeldExperts(experts, hold_one=hold_one, compiled=compiled)
    ranges = [expert.range for expert in experts]
    model = held.take(ranges.index(max(ranges)))  # the one that sees the noise first
    scene = scene or scene_of(model, config)
    assert config.num in (None, scene.num), "the scene is of another number of images"
    config = name_sampler(model.record.scheduler_config, config)
    scheduler = build_scheduler(
        model.record.scheduler_config, config, lay_out=scene.lay_out, has_latents=scene.has_latents
    )
    scene.load()
    device, threads = model.device, _fitting_threads(model, scene, config)
    del model  # so that `held` alone keeps it
    runs = _plan_runs(scheduler.timesteps, ranges, device)
    num, num_steps = scene.num, len(scheduler.timesteps)
    done, total = first * num_steps, num * num_steps
    size = min(config.batch_size, num - first) if compiled.is_on(device) else 0
    own = Shares(num, config.batch_size, first, world).own
    chunk = _batches_per_chunk(scene, config) if hold_one and len(experts) > 1 else 1
    for begin in range(0, len(own), chunk):
        batches = [
            _draw(span, scene, device, scheduler=scheduler, config=config)
            for span in own[begin : begin + chunk]
        ]
        for run in runs:
            for batch in batches:
                for step, t, timestep in run.steps:
                    denoiser = held.take(run.expert)
                    with using_threads(threads):
                        seen = _denoise(batch, denoiser, t, timestep, config=config, size=size)
                    del denoiser  # `held` alone decides how long it stays
                    if watch is not None:
                        watch(Forward(batch.start, step, t, run.expert, *seen))
                    done += len(batch.x_t)
                    yield StepProgress(done, total)
                if run is runs[-1]:
                    images = finish_images(batch.x_t, scene, config, first=batch.start)
                    yield ImageBatch(batch.start, images)


@dataclass(frozen=True)
class _Run:
    """Adjacent steps that one expert owns: (index, t for the scheduler, t on the device) each."""

    expert: int
    steps: list[tuple[int, float, Tensor]]


@dataclass
class _Batch:
    """Images under way, with what their scheduler remembers."""

    start: int
    generators: list[torch.Generator] | None  # kept where the sampler draws noise in its steps
    scheduler: Any
    x_t: Tensor  # (B, C, h, w) float32
    conditions: Conditions  # batch B, or 2B for guidance
    guidance: float | None  # where conditions come in pairs


def _plan_runs(
    timesteps: Tensor, ranges: Sequence[TimestepRange], device: torch.device
) -> list[_Run]:
    """The steps in the scheduler's order, cut where another expert takes over."""
    steps = zip(range(len(timesteps)), timesteps.tolist(), timesteps.to(device), strict=True)
    grouped = groupby(steps, key=lambda step: route(step[1], ranges))
    return [_Run(expert, list(group)) for expert, group in grouped]


def _fitting_threads(denoiser: Denoiser, scene: Scene, config: SampleConfig) -> int:
    """Threads for the forwards of a batch, which has every image twice for a guidance pair."""

    def inputs() -> tuple[Tensor, Conditions]:
        num = 2 if scene.is_paired else 1
        x_t = torch.zeros(num, *scene.latent_shape, dtype=denoiser.dtype)
        return x_t, to(scene.conditions(0, 1), x_t.device, denoiser.dtype)

    return fitting_number(denoiser.network, inputs, num_images=config.batch_size)


@torch.inference_mode()
def _batches_per_chunk(scene: Scene, config: SampleConfig) -> int:
    """Batches whose state stays within CHUNK_BYTES, at least one."""
    told = scene.conditions(0, 1).values()
    per_image = 4 * _STATE_TENSORS * math.prod(scene.latent_shape) + _GENERATOR_BYTES
    per_image += sum(value.numel() * value.element_size() for value in told)
    return max(1, CHUNK_BYTES // per_image // config.batch_size)


@torch.inference_mode()
def _draw(
    span: range, scene: Scene, device: torch.device, *, scheduler: Any, config: SampleConfig
) -> _Batch:
    """The images of `span` at the first timestep: noise, each from its own generator."""
    seeds = [image_seed(config.seed, index) for index in span]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = randn_tensor((len(span), *scene.latent_shape), generator=generators, device=device)
    return _Batch(
        start=span.start,
        generators=generators if uses_noise(config) else None,
        scheduler=copy.deepcopy(scheduler),
        x_t=noise * first_scale(scheduler),
        conditions=scene.conditions(span.start, span.stop),
        guidance=scene.guidance if scene.is_paired else None,
    )


@torch.inference_mode()
def _denoise(
    batch: _Batch, denoiser: Denoiser, t: float, timestep: Tensor, *, config: SampleConfig,
    size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advance `batch` by one step; returns x_t on the network's scale and what the network said.

    The network works in its own dtype, the scheduler in float32. size: images that the network
    sees at least.
    """
    x_t = scale_input(batch.scheduler, batch.x_t, t)
    output = predict_guided(
        denoiser, x_t.to(denoiser.dtype), timestep, batch.conditions, scale=batch.guidance,
        size=size,
    )  # fmt: skip
    batch.x_t = take_step(
        batch.scheduler, output, t, batch.x_t, config=config, generators=batch.generators
    )
    return x_t, output
