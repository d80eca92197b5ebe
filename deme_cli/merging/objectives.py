"""What a search of the coefficients minimises, on the same draws for every candidate.

`loss` is the denoising loss on held-out images, `experts` the distance to what the experts say,
`kid` and `fid` distances between images that the candidate makes and real ones. Draw i and image i
are functions of (seed, i) alone, so candidates differ in their weights and in nothing else.
Held-out images are dealt in two parts: a search sees one, its report, on other seeds, the other.
B batch, C channels, n draws or images, d features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deme_cli.config import MergeConfig, SampleConfig
from deme_cli.diffusion.schedule import Schedule
from deme_cli.errors import NumericsError
from deme_cli.evaluation.features import Extractor
from deme_cli.evaluation.frechet import RunningStatistics, frechet_distance
from deme_cli.evaluation.kid import kernel_distance
from deme_cli.evaluation.references import Reference
from deme_cli.sampling.conditioning import Conditioning
from deme_cli.sampling.ensemble import SamplingExpert
from deme_cli.sampling.sampler import ImageBatch, sample_images, seeded_noise
from deme_cli.timesteps import TimestepRange, parse_span, route
from deme_cli.training.batches import Check, FixedDraws
from deme_cli.training.examples import Examples


class HeldOutLoss:
    """Mean of (target - output)^2 over `num` draws of (x_0, t, eps), t uniform on [0, T) (Eq. 2).

    The draws of t are stratified, one from each of `num` equal parts of [0, T): the same mean with
    less variance. Images come in shuffled rounds, so each is used equally often, and each with its
    own caption or class. part: 0 or 1 for every other held-out image, None for all.
    `config.loss_range` takes the place of [0, T).
    """

    name = "loss"

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
        span = TimestepRange(0, schedule.num_train_timesteps)
        if config.loss_range is not None:
            span = parse_span(config.loss_range, "loss_range")
        rows = schedule.indices(span)
        strata = rows.start + (torch.arange(config.num) + place) / config.num * len(rows)
        self.draws = FixedDraws(
            examples,
            schedule,
            images=torch.cat(order)[: config.num],
            t=strata.long()[torch.randperm(config.num, generator=generator)],
            noise=lambda draws: seeded_noise(config.seed, examples.shape, draws.tolist()),
            batch_size=config.batch_size,
        )
        self.times = schedule.times(self.draws.t)  # that the network is told in each draw: (n,)
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

    def __call__(self, experts: Sequence[SamplingExpert], check: Check) -> float:
        return self.errors(experts, check).mean().item()

    def errors(self, experts: Sequence[SamplingExpert], check: Check) -> Tensor:
        """Squared error of each draw, by the expert of its timestep: (n,) float64."""
        errors = torch.zeros(len(self.draws.t), dtype=torch.float64)
        for network, chosen in self._turns(experts):
            errors[chosen] = self.draws.errors(network, check=check, chosen=chosen)
        return errors

    def draws_in(self, span: TimestepRange) -> Tensor:
        """Which draws have their time in `span`: (n,) bool. T, where a flow begins, is T - 1."""
        times = self.times.clamp(max=self.draws.schedule.num_train_timesteps - 1)
        return (times >= span.start) & (times < span.stop)

    def _turns(self, experts: Sequence[SamplingExpert]) -> Iterator[tuple[nn.Module, Tensor]]:
        """The network of each expert with the draws whose time it owns, where there are any."""
        if len(experts) == 1:
            yield experts[0].load().network, torch.arange(len(self.draws.t))
            return
        ranges = [expert.range for expert in experts]
        owner = torch.tensor([route(t, ranges) for t in self.times.tolist()])
        for index in owner.unique().tolist():
            yield experts[index].load().network, (owner == index).nonzero()[:, 0]


class ExpertsLoss(HeldOutLoss):
    """Mean of (expert's output - output)^2, each timestep judged by the expert that owns it.

    What an ensemble says is what the merged network should say: a least-squares fit of the
    coefficients to the experts' outputs on their own ranges. The experts are run once.
    """

    name = "experts"

    def __init__(
        self, examples: Examples, schedule: Schedule, config: MergeConfig,
        experts: Sequence[SamplingExpert], part: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(examples, schedule, config, part)
        targets = torch.zeros(len(self.times), *examples.shape)
        for network, chosen in self._turns(experts):
            targets[chosen] = self.draws.outputs(network, chosen)
        self.draws = replace(self.draws, targets=targets)


class GeneratedDistance:
    """Distance between features of `conditioning.num` generated images and of a reference.

    reference: opened, with statistics for a Fréchet distance, features for a kernel distance.
    """

    def __init__(
        self, extractor: Extractor, reference: Reference, *, sample: SampleConfig,
        conditioning: Conditioning,
    ) -> None:  # fmt: skip
        self._extractor, self._reference = extractor, reference
        self._sample, self._conditioning = sample, conditioning
        self.is_kernel = reference.features is not None
        weights = extractor.weights
        self.name = weights.name_of("kid" if self.is_kernel else "fid")
        self.protocol: dict[str, Any] = {
            "name": self.name,
            "extractor": weights.extractor,
            "reference": reference.source, "reference_n": reference.n,
            "reference_sha256": reference.sha256, "split": reference.split or reference.kind,
            **{key: value for key, value in asdict(sample).items() if key != "batch_size"},
            **conditioning.card,
        }  # fmt: skip

    def __call__(self, experts: Sequence[SamplingExpert], check: Check) -> float:
        try:
            return self.distance(self.features(experts, check))
        except NumericsError:
            return float("nan")  # this candidate's images are not finite; the others may be

    def features(self, experts: Sequence[SamplingExpert], check: Check) -> np.ndarray:
        """Features of the images: (n, d) float32."""
        num, parts = self._conditioning.num, []
        for record in sample_images(experts, self._sample, conditioning=self._conditioning):
            if isinstance(record, ImageBatch):
                parts.append(self._extractor.features(record.images).astype(np.float32))
            else:
                check(record, num)
        features = np.concatenate(parts)
        if not np.isfinite(features).all():
            raise NumericsError("the features are not finite; the images or the extractor are bad")
        return features

    def distance(self, features: np.ndarray) -> float:
        """The distance of features (n, d) to the reference."""
        if (other := self._reference.statistics) is None:
            assert self._reference.features is not None
            return kernel_distance(features, self._reference.features, seed=self._sample.seed)
        running = RunningStatistics()
        running.add(features)
        own = running.statistics()
        return frechet_distance(own.mu, own.sigma, other.mu, other.sigma)


Objective = HeldOutLoss | GeneratedDistance  # `name` and `protocol` are as JSON has them
