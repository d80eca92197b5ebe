"""Draw images from one denoiser or from an ensemble of experts, range by range.

B batch, C channels, H x W pixels. Image i starts from noise of its own generator, and fresh noise
in stochastic samplers comes from the same one, so it depends on (seed, i) alone. Expert i denoises
the timesteps of its range, whatever their place in the step list (Eq. 7). A chunk of batches passes
through one expert after another: each forward is paid once, so an ensemble costs what one model
costs, and an expert can leave memory before the next one comes.

Writing images anywhere is not done here.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from deme_cli.config import SampleConfig
from deme_cli.diffusion.denoiser import Denoiser, predict
from deme_cli.errors import NumericsError
from deme_cli.sampling.scheduler import build_scheduler, take_step, uses_noise
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
class ImageBatch:
    """Finished images start .. start + B - 1; `done` of `total` images are finished with it."""

    start: int
    images: np.ndarray  # uint8 (B, H, W, C)
    seeds: np.ndarray  # int64 (B,)
    done: int
    total: int


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index`: 63 bits, so that it fits an int64."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def single(denoiser: Denoiser) -> list[SamplingExpert]:
    """One denoiser as an ensemble of one, for [0, T)."""
    whole = TimestepRange(0, denoiser.schedule.num_train_timesteps)
    return [SamplingExpert(whole, lambda: denoiser)]


def collect_images(
    experts: Sequence[SamplingExpert], config: SampleConfig, *, hold_one: bool = False
) -> np.ndarray:
    """The images 0 .. config.num - 1 as one uint8 array (n, H, W, C)."""
    records = sample_images(experts, config, hold_one=hold_one)
    return np.concatenate([record.images for record in records if isinstance(record, ImageBatch)])


def sample_images(
    experts: Sequence[SamplingExpert],
    config: SampleConfig,
    *,
    hold_one: bool = False,
    first: int = 0,
) -> Iterator[StepProgress | ImageBatch]:
    """Draw the images first .. config.num - 1 of `config.seed`, in order.

    Yields a StepProgress after every forward and an ImageBatch for every finished batch. The
    experts' ranges must cover [0, T) once; `hold_one` frees each expert before the next is loaded.
    Raises ConfigError if the sampler does not fit the model, NumericsError on non-finite images.
    """
    held = _HeldExperts(experts, hold_one)
    ranges = [expert.range for expert in experts]
    model = held.take(ranges.index(max(ranges)))  # the one that sees the noise first
    scheduler = build_scheduler(model.record.scheduler_config, config)
    shape, device = model.sample_shape, model.device
    del model  # so that `held` alone keeps it
    runs = _plan_runs(scheduler.timesteps, ranges, device)
    num_steps = len(scheduler.timesteps)
    done, total = first * num_steps, config.num * num_steps
    alone = hold_one and len(experts) > 1
    chunk_size = _chunk_size(shape, config.batch_size) if alone else config.batch_size
    for chunk_start in range(first, config.num, chunk_size):
        chunk_stop = min(chunk_start + chunk_size, config.num)
        batches = [
            _draw(start, min(start + config.batch_size, chunk_stop), shape, device,
                  scheduler=scheduler, config=config)
            for start in range(chunk_start, chunk_stop, config.batch_size)
        ]  # fmt: skip
        for run in runs:
            for batch in batches:
                for t, timestep in run.timesteps:
                    _denoise(batch, held.take(run.expert), t, timestep, config)
                    done += len(batch.seeds)
                    yield StepProgress(done, total)
                if run is runs[-1]:
                    yield _finish(batch, config)


@dataclass(frozen=True)
class _Run:
    """Adjacent steps that one expert owns: (t for the scheduler, t on the device) each."""

    expert: int
    timesteps: list[tuple[float, Tensor]]


@dataclass
class _Batch:
    """Images under way, with what their scheduler remembers."""

    start: int
    seeds: list[int]
    generators: list[torch.Generator] | None  # kept where the sampler draws noise in its steps
    scheduler: Any
    x_t: Tensor  # (B, C, H, W) float32


class _HeldExperts:
    """Loaded experts by index: all of them, or only the one taken last."""

    def __init__(self, experts: Sequence[SamplingExpert], hold_one: bool) -> None:
        self._experts, self._hold_one = experts, hold_one
        self._held: dict[int, Denoiser] = {}

    def take(self, index: int) -> Denoiser:
        if index not in self._held:
            if self._hold_one:
                self._held.clear()
            self._held[index] = self._experts[index].load()
        return self._held[index]


def _plan_runs(
    timesteps: Tensor, ranges: Sequence[TimestepRange], device: torch.device
) -> list[_Run]:
    """The steps in the scheduler's order, cut where another expert takes over."""
    steps = list(zip(timesteps.tolist(), timesteps.to(device), strict=True))
    grouped = groupby(steps, key=lambda step: route(step[0], ranges))
    return [_Run(expert, list(group)) for expert, group in grouped]


def _chunk_size(shape: tuple[int, int, int], batch_size: int) -> int:
    """Images per chunk: whole batches within CHUNK_BYTES of state, at least one."""
    channels, height, width = shape
    per_image = 4 * _STATE_TENSORS * channels * height * width + _GENERATOR_BYTES
    return max(1, CHUNK_BYTES // per_image // batch_size) * batch_size


@torch.inference_mode()
def _draw(
    start: int,
    stop: int,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    scheduler: Any,
    config: SampleConfig,
) -> _Batch:
    """Images start .. stop - 1 at the first timestep: noise, each from its own generator."""
    seeds = [image_seed(config.seed, index) for index in range(start, stop)]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = randn_tensor((len(seeds), *shape), generator=generators, device=device)
    return _Batch(
        start=start,
        seeds=seeds,
        generators=generators if uses_noise(config) else None,
        scheduler=copy.deepcopy(scheduler),
        x_t=noise * scheduler.init_noise_sigma,
    )


@torch.inference_mode()
def _denoise(
    batch: _Batch, denoiser: Denoiser, t: float, timestep: Tensor, config: SampleConfig
) -> None:
    """Advance `batch` by one step; the network works in its own dtype, the scheduler in float32."""
    x_in = batch.scheduler.scale_model_input(batch.x_t, t).to(denoiser.dtype)
    output = predict(denoiser.network, x_in, timestep).float()
    batch.x_t = take_step(
        batch.scheduler, output, t, batch.x_t, config=config, generators=batch.generators
    )


@torch.inference_mode()
def _finish(batch: _Batch, config: SampleConfig) -> ImageBatch:
    """x_0 in [-1, 1] as uint8, rounded as diffusers' pipelines do."""
    stop = batch.start + len(batch.seeds)
    if not torch.isfinite(batch.x_t).all():
        raise NumericsError(
            f"images {batch.start} to {stop - 1} are not finite after {config.steps} steps of "
            f"{config.sampler}; the weights are broken, or --dtype is too narrow for them"
        )
    levels = (batch.x_t / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    images = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    seeds = np.array(batch.seeds, dtype=np.int64)
    return ImageBatch(batch.start, images, seeds, done=stop, total=config.num)
