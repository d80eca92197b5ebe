"""What every model of an analysis sees: images, and draws (x_0, t, eps) of them fixed by a seed.

In each of some spans of timesteps the same number of draws, t evenly over the span and in random
order; images in shuffled rounds over all draws, so that each is used equally often. All of it is a
function of the seed, what the draws are for, and the spans; noise is one of (seed, number of the
draw), so nothing depends on the batch size. And how far a mean over draws is off.
m values, G clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deme_cli.artifacts import DenoiserRecord
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.console import Progress
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import choose_device
from deme_cli.diffusion.schedule import Schedule
from deme_cli.run_file import RunFile
from deme_cli.sampling.sampler import seeded_noise
from deme_cli.timesteps import TimestepRange
from deme_cli.training.batches import FixedDraws, derived_generator
from deme_cli.training.examples import Examples, fill_caches, name_companions, open_examples

INTERVALS = "95 %, over images (draws of one image are a cluster)"


def open_images(
    record: DenoiserRecord, images: DataConfig, run: RunFile, *, split: str, model: str,
    output: Path, pipeline: str | None, device: str, progress: Progress,
) -> tuple[DenoiserRecord, Examples]:  # fmt: skip
    """The images as a model of this record takes them, and the record with its frozen parts named.

    Latents are cached beside the model where that is a file, else beside the output. Raises what
    `open_companions` and `open_examples` raise.
    """
    pipeline = run.pipeline(pipeline)
    record = name_companions(record, pipeline)
    companions = open_companions(record, pipeline=pipeline, device=str(choose_device(device)))
    examples = open_examples(
        images, companions, split=split, cache=run.settings(FinetuneConfig).cache,
        beside=Path(model).parent if Path(model).is_file() else output.parent,
    )  # fmt: skip
    fill_caches(examples, progress=progress)
    return record, examples


def identity_of(record: DenoiserRecord, examples: Examples) -> dict[str, Any]:
    """What decides what a model of this record sees: its schedule, its frozen parts, the images."""
    return {
        "scheduler": record.scheduler_config,
        "companions": record.companions,
        "data": examples.fingerprint,
        "shape": list(examples.image_shape),
    }


def spread_draws(
    examples: Examples, schedule: Schedule, spans: Sequence[TimestepRange], num: int,
    *, seed: int, purpose: str, batch_size: int,
) -> FixedDraws:  # fmt: skip
    """`num` draws in each span, in the order of spans.

    Raises ConfigError where a flow schedule has no time in a span.
    """
    generator = derived_generator(seed, purpose, *spans)
    times = []
    for rows in map(schedule.indices, spans):
        t = rows.start + torch.arange(num) * len(rows) // num
        times.append(t[torch.randperm(num, generator=generator)])
    total = num * len(spans)
    rounds = -(-total // len(examples))
    order = [torch.randperm(len(examples), generator=generator) for _ in range(rounds)]
    noise_seed = int(torch.randint(1 << 62, (), generator=generator))

    def noise(chosen: Tensor) -> Tensor:
        return seeded_noise(noise_seed, examples.shape, chosen.tolist())

    images = torch.cat(order)[:total]
    return FixedDraws(examples, schedule, images, torch.cat(times), noise, batch_size)


def part(draws: FixedDraws, chosen: range) -> FixedDraws:
    """Some successive draws as draws of their own."""
    own = slice(chosen.start, chosen.stop)

    def noise(numbers: Tensor) -> Tensor:
        return draws.noise(numbers + chosen.start)

    return replace(draws, images=draws.images[own], t=draws.t[own], noise=noise)


@dataclass(frozen=True)
class Estimate:
    """A mean over draws and the half-width of its 95 % interval; nan for one image alone."""

    mean: float
    half: float

    @property
    def is_told_from_zero(self) -> bool:
        return abs(self.mean) > self.half


def estimate(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """The mean of values (m,) with the half-width of its 95 % interval over clusters (m,).

    Draws that share an image are not independent, so they are one cluster: the cluster-robust
    variance of a mean, G / (G - 1) sum_g (sum of residuals in g)^2 / m^2, with Student's t of G - 1
    degrees of freedom (Cameron & Miller 2015, section II). That timesteps are spread evenly is left
    out, so intervals are a little too wide. Both are nan where a value is not finite.
    """
    from scipy.special import stdtrit

    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(values.mean())
        _, cluster = np.unique(clusters, return_inverse=True)
        sums = np.bincount(cluster.reshape(-1), weights=values - mean)
        if len(sums) < 2:
            return Estimate(mean, float("nan"))
        variance = len(sums) / (len(sums) - 1) * float(sums @ sums) / len(values) ** 2
    return Estimate(mean, float(stdtrit(len(sums) - 1, 0.975)) * variance**0.5)
