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

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from deme_cli.config import SampleConfig
from deme_cli.diffusion.conditions import Conditions, to
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.threads import fitting_number, using_threads
from deme_cli.distributed import ALONE, World
from deme_cli.sampling.batch import Timestep, denoise, draw_batch
from deme_cli.sampling.compiled import UNCOMPILED, CompiledSteps
from deme_cli.sampling.finish import finish_images
from deme_cli.sampling.held_experts import HeldExperts
from deme_cli.sampling.scene import Scene, scene_of
from deme_cli.sampling.scheduler import build_scheduler, name_sampler
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
    compiled: CompiledSteps = UNCOMPILED,
) -> Iterator[StepProgress | ImageBatch]:
    """Draw the images first .. scene.num - 1 of `config.seed`, in order.

    Yields a StepProgress after every forward and an ImageBatch for every finished batch. The
    experts' ranges must cover [0, T) once; `hold_one` frees each expert before the next is loaded.
    Without a scene, `config` and the model's own record make it. `watch` is shown every forward.
    A process of `world` draws its share of the batches, talking to nobody, and counts no others.
    `compiled`: what steps go through; where it is on, in batches of one size, and images change by
    rounding.
    Raises ConfigError if the sampler does not fit the model, ArtifactError if the frozen parts
    around it are others than its base's, NumericsError on non-finite images.
    """
    held = HeldExperts(experts, hold_one=hold_one, compiled=compiled)
    ranges = [expert.range for expert in experts]
    model = held.take(ranges.index(max(ranges))).denoiser  # the one that sees the noise first
    scene = scene or scene_of(model, config)
    assert config.num in (None, scene.num), "the scene is of another number of images"
    config = name_sampler(model.record, config)
    trained_on, changes = model.record.scheduler_config, scene.scheduler_changes
    scheduler = build_scheduler(trained_on, config, lay_out=scene.lay_out, changes=changes)
    scene.load()
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    threads, is_compiled = _fitting_threads(model, scene, config), compiled.is_on(model.device)
    del model  # so that `held` alone keeps it
    runs = _plan_runs(scheduler.timesteps, ranges, like.device)
    num, num_steps = scene.num, len(scheduler.timesteps)
    done, total = first * num_steps, num * num_steps
    size = min(config.batch_size, num - first) if is_compiled else 0
    own = Shares(num, config.batch_size, first, world).own
    chunk = _batches_per_chunk(scene, config) if hold_one and len(experts) > 1 else 1
    for begin in range(0, len(own), chunk):
        batches = [
            draw_batch(span, scene, like, scheduler=scheduler, config=config, size=size)
            for span in own[begin : begin + chunk]
        ]
        for run in runs:
            for batch in batches:
                for at in run.steps:
                    with using_threads(threads):
                        seen = denoise(batch, held.take(run.expert).step, at, config)
                    if watch is not None:
                        watch(Forward(batch.start, at.index, at.t, run.expert, *seen))
                    done += batch.num
                    yield StepProgress(done, total)
                if run is runs[-1]:
                    latents = batch.x_t[: batch.num]
                    images = finish_images(latents, scene, config, first=batch.start)
                    yield ImageBatch(batch.start, images)


@dataclass(frozen=True)
class _Run:
    """Adjacent steps that one expert owns."""

    expert: int
    steps: list[Timestep]


def _plan_runs(
    timesteps: Tensor, ranges: Sequence[TimestepRange], device: torch.device
) -> list[_Run]:
    """The steps in the scheduler's order, cut where another expert takes over."""
    times = zip(timesteps.tolist(), timesteps.to(device), strict=True)
    steps = [Timestep(index, *time) for index, time in enumerate(times)]
    grouped = groupby(steps, key=lambda step: route(step.t, ranges))
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
