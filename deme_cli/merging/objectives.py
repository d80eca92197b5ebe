"""What a search of the coefficients minimises, on the same draws for every candidate.

`loss` is the denoising loss on held-out images, `experts` the distance to what the experts say,
`kid` and `fid` distances between images that the candidate makes and real ones. Draw i and image i
are functions of (seed, i) alone, so candidates differ in their weights and in nothing else; and
what one stage has drawn of a candidate is the beginning of what the next one needs: features are
kept on disk and only the missing images are drawn. Held-out images are dealt in two parts: a search
sees one, its report, on other seeds, the other.
B batch, C channels, n draws or images, d features.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from deme_cli.artifacts import DenoiserRecord
from deme_cli.config import DataConfig, MergeConfig, SampleConfig
from deme_cli.data.images import open_images
from deme_cli.data.prompts import PromptSet, read_prompts
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.schedule import Schedule, read_schedule
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.evaluation.features import Extractor, load_extractor
from deme_cli.evaluation.frechet import RunningStatistics, Statistics, frechet_distance
from deme_cli.evaluation.kid import kernel_distance
from deme_cli.evaluation.references import Reference, find_reference, open_reference
from deme_cli.files import write_whole
from deme_cli.merging.successive_halving import Stage, label_of
from deme_cli.sampling.conditioning import Conditioning, open_conditioning
from deme_cli.sampling.ensemble import SamplingExpert
from deme_cli.sampling.sampler import ImageBatch, sample_images, seeded_noise
from deme_cli.sampling.scheduler import name_sampler
from deme_cli.timesteps import TimestepRange, parse_span, route
from deme_cli.training.batches import Check, FixedDraws
from deme_cli.training.examples import Examples, name_companions, open_examples

if TYPE_CHECKING:
    from deme_cli.merging.plan import Measure

SEARCH, REPORT = 0, 1  # the part of the held-out images, and which reference


class Objective(Protocol):
    """A number per model, smaller is better; not finite where the candidate is broken.

    `key` names the candidate, so that what was drawn of it before need not be drawn again.
    """

    name: str  # as JSON has it
    label: str  # as people call it
    protocol: dict[str, Any]  # everything the number depends on, besides the candidate

    def __call__(self, experts: Sequence[SamplingExpert], check: Check, key: str = "") -> float: ...


class HeldOutLoss:
    """Mean of (target - output)^2 over `num` draws of (x_0, t, eps), t uniform on [0, T) (Eq. 2).

    The draws of t are stratified, one from each of `num` equal parts of [0, T): the same mean with
    less variance. Images come in shuffled rounds, so each is used equally often, and each with its
    own caption or class. part: 0 or 1 for every other held-out image, None for all.
    `config.loss_range` takes the place of [0, T).
    """

    name, label = "loss", label_of("loss")

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

    name, label = "experts", label_of("experts")

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


class FeatureStore:
    """Features of candidates' images, by a key, in a folder that goes when the search ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: str) -> np.ndarray | None:
        """What is kept: (m, d) float32. A file that is not whole counts as nothing."""
        try:
            return np.load(self.folder / f"{key}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None

    def save(self, key: str, features: np.ndarray) -> None:
        stream = io.BytesIO()
        np.save(stream, features, allow_pickle=False)
        write_whole(self.folder / f"{key}.npy", [stream.getvalue()])

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class GeneratedDistance:
    """Distance between features of `conditioning.num` generated images and of a reference.

    reference: statistics for a Fréchet distance, features (m, d) for a kernel distance.
    """

    def __init__(
        self, extractor: Extractor, reference: Statistics | np.ndarray, card: dict[str, Any],
        *, sample: SampleConfig, conditioning: Conditioning, store: FeatureStore | None = None,
    ) -> None:  # fmt: skip
        self._extractor, self._reference = extractor, reference
        self._sample, self._conditioning, self._store = sample, conditioning, store
        self.is_kernel = not isinstance(reference, Statistics)
        weights = extractor.weights
        self.name = weights.kernel_name if self.is_kernel else weights.metric_name
        self.label = label_of(self.name)
        self.protocol: dict[str, Any] = {
            "name": self.name,
            "extractor": weights.extractor,
            **card,
            **{key: value for key, value in asdict(sample).items() if key != "batch_size"},
            **conditioning.card,
        }
        drawn = {k: v for k, v in self.protocol.items() if k not in ("name", "num", *card)}
        self._drawn = json.dumps(drawn, sort_keys=True, default=str)

    def __call__(self, experts: Sequence[SamplingExpert], check: Check, key: str = "") -> float:
        try:
            return self.distance(self.features(experts, check, key))
        except NumericsError:
            return float("nan")  # this candidate's images are not finite; the others may be

    def features(
        self, experts: Sequence[SamplingExpert], check: Check, key: str = ""
    ) -> np.ndarray:
        """Features of the images (n, d) float32, those kept under `key` not drawn again."""
        place = hashlib.sha256(f"{key}{self._drawn}".encode()).hexdigest()[:32]
        kept = self._store.load(place) if self._store and key else None
        num, parts = self._conditioning.num, []
        if kept is not None:
            parts.append(kept[:num])
        first = len(parts[0]) if parts else 0
        drawing = sample_images(experts, self._sample, conditioning=self._conditioning, first=first)
        for record in drawing if first < num else ():
            if isinstance(record, ImageBatch):
                parts.append(self._extractor.features(record.images).astype(np.float32))
            else:
                check(record, num)
        features = np.concatenate(parts)
        if not np.isfinite(features).all():
            raise NumericsError("the features are not finite; the images or the extractor are bad")
        if self._store and key and first < num:
            self._store.save(place, features)
        return features

    def distance(self, features: np.ndarray) -> float:
        """The distance of features (n, d) to the reference."""
        if isinstance(self._reference, Statistics):
            running = RunningStatistics()
            running.add(features)
            found = running.statistics()
            return frechet_distance(
                found.mu, found.sigma, self._reference.mu, self._reference.sigma
            )
        return kernel_distance(features, self._reference, seed=self._sample.seed)


class Workbench:
    """Opens objectives for candidates like `record`; networks and images are loaded once."""

    def __init__(
        self, measure: Measure, record: DenoiserRecord, *, store: FeatureStore | None = None
    ) -> None:
        self.measure, self.store = measure, store
        self.record = name_companions(record, measure.pipeline)

    def open(
        self,
        stage: Stage,
        config: MergeConfig,
        *,
        part: int = SEARCH,
        experts: Callable[[], Sequence[SamplingExpert]] | None = None,
    ) -> Objective:
        """The objective of a stage with the seed of `config`; part: SEARCH or REPORT.

        experts: those of an ensemble, for the objective `experts`.
        """
        config = replace(config, num=stage.num)
        if stage.is_distance:
            return self._distance(stage, config, part)
        schedule = read_schedule(self.record.scheduler_config)
        if stage.name == "loss":
            return HeldOutLoss(self.examples, schedule, config, part)
        assert experts is not None
        return ExpertsLoss(self.examples, schedule, config, experts(), part)

    @cached_property
    def examples(self) -> Examples:
        """The held-out images."""
        measure = self.measure
        companions = open_companions(
            self.record, pipeline=measure.pipeline, device=measure.device, dtype=measure.dtype
        )
        return open_examples(
            measure.images, companions, split="held-out", cache=measure.cache, beside=measure.beside
        )

    @cached_property
    def extractor(self) -> Extractor:
        measure = self.measure
        return load_extractor(measure.features, resize=measure.resize, device=measure.device)

    def _distance(self, stage: Stage, config: MergeConfig, part: int) -> GeneratedDistance:
        sample = replace(
            self.measure.sample, num=config.num, steps=config.steps, seed=config.seed,
            batch_size=config.batch_size,
        )  # fmt: skip
        sample = name_sampler(self.record, sample)
        conditioning = self._conditioning(sample)
        reference, card = self._reference(stage.name == "kid", part, conditioning)
        return GeneratedDistance(
            self.extractor, reference, card, sample=sample, conditioning=conditioning,
            store=self.store if part == SEARCH else None,
        )  # fmt: skip

    def _reference(
        self, is_kernel: bool, part: int, conditioning: Conditioning
    ) -> tuple[Statistics | np.ndarray, dict[str, Any]]:
        """Statistics or features to compare with, and how the protocol tells of them.

        Images come at their own size, or, where a VAE has a size of its own, at that of what is
        drawn.
        """
        found = self._find_reference(is_kernel, part)
        shape = conditioning.image_shape if is_kernel or conditioning.has_latents else None
        opened = open_reference(found, self.extractor, shape, kernel=is_kernel)
        reference = opened.features if is_kernel else opened.statistics
        assert reference is not None, "a process alone has looked at all images itself"
        card = {
            "reference": found.source, "reference_n": opened.n, "reference_sha256": opened.sha256,
            "split": found.split or found.kind,
        }  # fmt: skip
        return reference, card

    def _find_reference(self, is_kernel: bool, part: int) -> Reference:
        weights, measure = self.extractor.weights, self.measure
        other = measure.report_reference if part == REPORT else None
        split = None if other else "train" if part == SEARCH else "test"
        return find_reference(
            other or measure.source,
            weights.family,
            weights.resize,
            weights=weights,
            kernel=is_kernel,
            split=split,
        )

    def _conditioning(self, sample: SampleConfig) -> Conditioning:
        """What candidates draw: classes in turn, prompts in turn, or nothing in particular."""
        measure, prompts = self.measure, None
        if backbone_of(self.record.model_config).wants == "text":
            sample = replace(sample, per_prompt=1)
            prompts = _prompts(measure.images, sample)
        return open_conditioning(
            self.record, sample, prompts=prompts, pipeline=measure.pipeline,
            device=measure.device, dtype=measure.dtype,
        )  # fmt: skip


def _prompts(images: DataConfig, sample: SampleConfig) -> PromptSet:
    """The prompts of [sample], else the captions of the training images, from the first on."""
    if sample.prompts:
        return replace(read_prompts(sample.prompts, column=sample.prompt_column), cycles=True)
    data = open_images(
        images.source, shape=(3, 8, 8), wants="text", captions=images.captions, keep=False
    )
    captions = data.captions(range(len(data)))
    return PromptSet(f"captions of {images.source}", tuple(captions), cycles=True)
