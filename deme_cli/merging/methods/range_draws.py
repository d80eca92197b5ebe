"""Batches of x_t, with t drawn from one range: what an expert meets at its own timesteps.

Draw i is an image, a timestep and noise, each a function of (seed, i) alone: the same draws at any
batch size, and more of them only add to the first. Images come in shuffled rounds. Timesteps follow
the additive recurrence frac(u + i g), g the golden ratio, which fills a range evenly at any number
of draws (Niederreiter 1992, ch. 3); u comes from the seed. All ranges share images and noise.
B batch, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deme_cli.diffusion.conditions import Conditions, to
from deme_cli.diffusion.schedule import Schedule
from deme_cli.sampling.noise import seeded_noise
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import Examples

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class RangeBatch:
    """x_t, target: (B, C, H, W)   times: (B,), what the network is told   conditions: (B, ...)."""

    x_t: Tensor
    times: Tensor
    conditions: Conditions
    target: Tensor

    def __len__(self) -> int:
        return len(self.x_t)


@dataclass(frozen=True)
class RangeDraws:
    """`num` draws per range from `examples`, noised by `schedule`."""

    examples: Examples
    schedule: Schedule
    num: int
    batch_size: int
    seed: int

    def batches(self, span: TimestepRange, network: nn.Module) -> Iterator[RangeBatch]:
        """The draws of one range in order, where `network` is; the target in float32, the rest in
        its dtype.

        Raises ConfigError where a flow schedule has no time in `span`.
        """
        first = next(network.parameters())
        images, t = self.images(), self.timesteps(span)
        for chosen in torch.arange(self.num).split(self.batch_size):
            x0, conditions = self.examples.draw(images[chosen].tolist(), flip=None, generator=None)
            x0, eps = x0.cpu(), seeded_noise(self.seed, self.examples.shape, chosen.tolist())
            yield RangeBatch(
                self.schedule.add_noise(x0, eps, t[chosen]).to(first.device, first.dtype),
                self.schedule.times(t[chosen]).to(first.device),
                to(conditions, first.device, first.dtype),
                self.schedule.target(x0, eps, t[chosen]).to(first.device),
            )

    def images(self) -> Tensor:
        """The number of the image of each draw: (num,)"""
        generator = torch.Generator().manual_seed(self.seed)
        rounds = -(-self.num // len(self.examples))
        order = [torch.randperm(len(self.examples), generator=generator) for _ in range(rounds)]
        return torch.cat(order)[: self.num]

    def timesteps(self, span: TimestepRange) -> Tensor:
        """The row of the schedule of each draw, within `span`: (num,)"""
        rows = self.schedule.indices(span)
        generator = torch.Generator().manual_seed(self.seed)
        first = torch.rand((), generator=generator, dtype=torch.float64)
        place = (first + torch.arange(self.num) * _GOLDEN) % 1
        return rows.start + (place * len(rows)).long()
