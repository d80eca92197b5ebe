"""Objectives without sampling: the denoising loss on held-out images, and the distance to experts.

Draw i is a function of (seed, i) alone, so candidates differ in their weights and in nothing else.
Held-out images are dealt in two parts: a search sees one, the report the other.
B batch, C channels, n draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deme_cli.config import MergeConfig
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.schedule import Schedule
from deme_cli.errors import ConfigError
from deme_cli.sampling.ensemble import SamplingExpert
from deme_cli.sampling.sampler import seeded_noise
from deme_cli.timesteps import TimestepRange, parse_span, route
from deme_cli.training.examples import Examples
from deme_cli.training.held_out import Check, FixedDraws


class HeldOutLoss:
    """Mean of (target - output)^2 over `num` draws of (x_0, t, eps), t uniform on [0, T) (Eq. 2).

    The draws of t are stratified, one from each of `num` equal parts of [0, T): the same mean with
    less variance. Images come in shuffled rounds, so each is used equally often, and each with its
    own caption or class. part: 0 or 1 for every other held-out image, None for all.
    `config.loss_range` takes the place of [0, T).
    """

    name, label = "loss", "held-out loss"

    def __init__(
        self, examples: Examples, schedule: Schedule, config: MergeConfig, part: int | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        numbers = torch.arange(len(examples))
        part = part if len(numbers) > 1 else None  # one image cannot be dealt in two
        if part is not None:
            numbers = numbers[part::2]
        rounds = -(-config.num // len(numbers))
        order = [numbers[torch.randperm(len(numbers), generator=generator)] for _ in range(rounds)]
        place = torch.rand(config.num, generator=generator, dtype=torch.float64)
        rows = schedule.indices(_span(config.loss_range, schedule))
        strata = rows.start + (torch.arange(config.num) + place) / config.num * len(rows)
        self.examples = examples
        self.draws = FixedDraws(
            examples,
            schedule,
            images=torch.cat(order)[: config.num],
            t=strata.long()[torch.randperm(config.num, generator=generator)],
            noise=lambda draws: seeded_noise(config.seed, examples.shape, draws.tolist()),
            batch_size=config.batch_size,
        )
        self.protocol: dict[str, Any] = {
            "name": self.name,
            "data": examples.source,
            "data_fingerprint": examples.fingerprint,
            "image_shape": list(examples.image_shape),
            "split": "held-out" if part is None else f"held-out, part {part + 1} of 2",
            "range": config.loss_range,
            "num": config.num,
            "seed": config.seed,
        }

    def __call__(self, experts: Sequence[SamplingExpert], check: Check, key: str = "") -> float:
        return self.errors(experts, check).mean().item()

    def errors(self, experts: Sequence[SamplingExpert], check: Check) -> Tensor:
        """Squared error of each draw, by the expert of its timestep: (n,) float64."""
        errors = torch.zeros(len(self.draws.t), dtype=torch.float64)
        for network, chosen in self._turns(experts):
            errors[chosen] = self.draws.errors(network, check=check, chosen=chosen)
        return errors

    def by_range(self, errors: Tensor, ranges: Sequence[TimestepRange]) -> list[float | None]:
        """The mean error of the draws in each range; None where there are none."""
        means = [errors[self.draws_in(span)].mean().item() for span in ranges]
        return [mean if math.isfinite(mean) else None for mean in means]

    def draws_in(self, span: TimestepRange) -> Tensor:
        """Which draws have their time in `span`: (n,) bool. T, where a flow begins, is T - 1."""
        times = self.times.clamp(max=self.draws.schedule.num_train_timesteps - 1)
        return (times >= span.start) & (times < span.stop)

    def value_and_gradient(self, denoiser: Denoiser, check: Check) -> float:
        """The loss of one network, its gradient left in `.grad` of the parameters."""
        return self.draws.loss_and_gradient(denoiser.network, check)

    @property
    def times(self) -> Tensor:
        """The time that the network is told in each draw: (n,)."""
        return self.draws.schedule.times(self.draws.t)

    def _turns(self, experts: Sequence[SamplingExpert]) -> Iterator[tuple[nn.Module, Tensor]]:
        """The network of each expert with the draws whose time it owns, where there are any."""
        if len(experts) == 1:
            yield experts[0].load().network, torch.arange(len(self.draws.t))
            return
        ranges = [expert.range for expert in experts]
        owner = torch.tensor([route(t, ranges) for t in self.times.tolist()])
        for index in owner.unique().tolist():
            yield experts[index].load().network, (owner == index).nonzero()[:, 0]


def _span(text: str | None, schedule: Schedule) -> TimestepRange:
    """The timesteps that are measured on. Raises ConfigError where they reach past T."""
    horizon = schedule.num_train_timesteps
    span = TimestepRange(0, horizon) if text is None else parse_span(text, "loss_range")
    if span.stop > horizon:
        raise ConfigError(f"loss_range {span} reaches past the {horizon} timesteps of this model")
    return span


class ExpertsLoss(HeldOutLoss):
    """Mean of (expert's output - output)^2, each timestep judged by the expert that owns it.

    What an ensemble says is what the merged network should say: a least-squares fit of the
    coefficients to the experts' outputs on their own ranges. The experts are run once.
    """

    name, label = "experts", "squared distance to the experts"

    def __init__(
        self, examples: Examples, schedule: Schedule, config: MergeConfig,
        experts: Sequence[SamplingExpert], part: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(examples, schedule, config, part)
        self.draws = replace(self.draws, targets=self._say(experts))

    @torch.no_grad()
    def _say(self, experts: Sequence[SamplingExpert]) -> Tensor:
        """What the expert of each draw says: (n, C, H, W) float32."""
        said = torch.zeros(len(self.draws.t), *self.examples.shape)
        for network, chosen in self._turns(experts):
            said[chosen] = self.draws.outputs(network, chosen)
        return said
