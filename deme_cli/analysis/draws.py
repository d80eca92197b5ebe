"""What every model of an analysis sees: images, and draws (x_0, t, eps) of them fixed by a seed.

In each of some spans of timesteps the same number of draws, t evenly over the span and in random
order; images in shuffled rounds over all draws, so that each is used equally often. All of it is a
function of the seed, what the draws are for, and the spans; noise is one of (seed, number of the
draw), so nothing depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deme_cli.config import DataConfig
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.schedule import Schedule
from deme_cli.records import DenoiserRecord
from deme_cli.sampling.noise import seeded_noise
from deme_cli.timesteps import TimestepRange
from deme_cli.training.batches import derived_generator
from deme_cli.training.examples import Examples
from deme_cli.training.held_out import FixedDraws
from deme_cli.training.materials import name_companions, open_examples


def open_images_of(
    record: DenoiserRecord, images: DataConfig, *, split: str, cache: str, beside: Path,
    pipeline: str | None, device: str,
) -> tuple[DenoiserRecord, Examples]:  # fmt: skip
    """The images as a model of this record takes them, and the record with its frozen parts named.

    Their latents are cached in `beside` where the model has any. Raises what `open_companions` and
    `open_examples` raise.
    """
    record = name_companions(record, pipeline)
    companions = open_companions(record, pipeline=pipeline, device=device)
    return record, open_examples(images, companions, split=split, cache=cache, beside=beside)


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
