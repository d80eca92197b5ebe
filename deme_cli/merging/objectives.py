"""What a search of the coefficients minimises, on the same draws for every candidate.

`loss` is the denoising loss on held-out images; `fid` the Fréchet distance between images the
candidate makes and the training images. Draw i and image i depend on (seed, i) alone, so candidates
differ in their weights and in nothing else. The seed is the search's own: what reports the result
later must use others.
B batch, C channels, T timesteps.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from deme_cli.config import DataConfig, MergeConfig, SampleConfig
from deme_cli.data.fitting import Shape
from deme_cli.data.images import open_images
from deme_cli.data.prompts import PromptSet, read_prompts
from deme_cli.diffusion.backbones.known import backbone_of
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.schedule import Schedule, read_schedule
from deme_cli.errors import NumericsError
from deme_cli.evaluation.frechet import RunningStatistics, Statistics, frechet_distance
from deme_cli.records import DenoiserRecord
from deme_cli.sampling.sampler import ImageBatch, image_seed, sample_images, single
from deme_cli.sampling.scene import Scene, open_scene
from deme_cli.sampling.scheduler import name_sampler
from deme_cli.training.examples import Examples
from deme_cli.training.held_out import Check, FixedDraws
from deme_cli.training.materials import name_companions, open_examples

if TYPE_CHECKING:
    from deme_cli.evaluation.features import Extractor


class Objective(Protocol):
    """A number per denoiser, smaller is better; not finite where the candidate is broken."""

    label: str  # as people call it
    protocol: dict[str, Any]  # everything the number depends on, besides the candidate
    examples: Examples | None  # what it draws from; their cache may still have to be filled

    def __call__(self, denoiser: Denoiser, check: Check) -> float: ...


class HeldOutLoss:
    """Mean of (target - output)^2 over `num` draws of (x_0, t, eps), t uniform on [0, T) (Eq. 2).

    The draws of t are stratified, one from each of `num` equal parts of [0, T): the same mean with
    less variance. Images come in shuffled rounds, so each is used equally often, and each with its
    own caption or class.
    """

    label = "held-out loss"

    def __init__(self, examples: Examples, schedule: Schedule, config: MergeConfig) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        rounds = -(-config.num // len(examples))
        order = [torch.randperm(len(examples), generator=generator) for _ in range(rounds)]
        place = torch.rand(config.num, generator=generator, dtype=torch.float64)
        strata = (torch.arange(config.num) + place) / config.num * schedule.num_train_timesteps
        self.examples = examples
        self.draws = FixedDraws(
            examples,
            schedule,
            images=torch.cat(order)[: config.num],
            t=strata.long()[torch.randperm(config.num, generator=generator)],
            noise=partial(_noise, config.seed, examples.shape),
            batch_size=config.batch_size,
        )
        self.protocol = {
            "name": "loss",
            "data": examples.source,
            "data_fingerprint": examples.fingerprint,
            "image_shape": list(examples.image_shape),
            "split": "held-out",
            "num": config.num,
            "seed": config.seed,
        }

    def __call__(self, denoiser: Denoiser, check: Check) -> float:
        return self.draws.loss(denoiser.network, check=check)


class GeneratedDistance:
    """Fréchet distance between the features of `sample.num` generated images and of a reference."""

    examples = None

    def __init__(
        self, extractor: Extractor, reference: Statistics, source: str,
        *, sample: SampleConfig, scene: Scene,
    ) -> None:  # fmt: skip
        self._extractor, self._reference = extractor, reference
        self._sample, self._scene = sample, scene
        on_inception = extractor.metric_name == "fid"
        self.label = "FID" if on_inception else f"Fréchet distance on {extractor.name}"
        self.protocol = {
            "name": extractor.metric_name,
            "extractor": {"name": extractor.name, "sha256": extractor.sha256},
            "reference": source,
            "reference_n": reference.n,
            "split": "train",
            **{key: value for key, value in asdict(sample).items() if key != "batch_size"},
            **scene.card,
        }

    def __call__(self, denoiser: Denoiser, check: Check) -> float:
        statistics = RunningStatistics()
        try:
            for record in sample_images(single(denoiser), self._sample, scene=self._scene):
                check()
                if isinstance(record, ImageBatch):
                    statistics.add(self._extractor.features(record.images))
            found, reference = statistics.statistics(), self._reference
            return frechet_distance(found.mu, found.sigma, reference.mu, reference.sigma)
        except NumericsError:
            return float("nan")  # this candidate's images are not finite; the others may be


def open_objective(
    config: MergeConfig,
    record: DenoiserRecord,
    *,
    images: DataConfig,
    sample: SampleConfig,
    features: str,
    resize: str,
    device: str,
    dtype: str = "fp32",
    pipeline: str | None = None,
    cache: str = "off",
    beside: Path = Path("."),
) -> Objective:
    """The objective that `config` names, on the run's `images`, for candidates like `record`.

    `features` and `resize` are those of the distance, `sample` says how its images are drawn; the
    loss reads latents through `cache`, which `auto` puts beside the base, in `beside`.
    """
    record = name_companions(record, pipeline)
    place = {"pipeline": pipeline, "device": device, "dtype": dtype}
    if config.objective == "loss":
        companions = open_companions(record, **place)
        examples = open_examples(images, companions, split="held-out", cache=cache, beside=beside)
        return HeldOutLoss(examples, read_schedule(record.scheduler_config), config)
    from deme_cli.evaluation.features import load_extractor

    sample = name_sampler(record.scheduler_config, sample)
    scene = _open_scene(record, images, sample, **place)
    extractor = load_extractor(features, resize=resize, device=device)
    reference = _reference(images.source, extractor, scene)
    return GeneratedDistance(extractor, reference, images.source, sample=sample, scene=scene)


def _reference(source: str, extractor: Extractor, scene: Scene) -> Statistics:
    """The features of the training images: at their own size, or, where a VAE has a size of
    its own, at that of the images that are drawn."""
    from deme_cli.evaluation.references import find_reference
    from deme_cli.evaluation.targets import open_target, reference_statistics

    if not scene.has_latents:
        return reference_statistics(source, extractor, split="train")
    weights = extractor.weights
    found = find_reference(source, weights.family, weights.resize, weights=weights, split="train")
    *_, target = open_target(extractor.metric_name, found, extractor, scene.image_shape)
    return target.statistics


def _open_scene(
    record: DenoiserRecord, images: DataConfig, sample: SampleConfig, **place: Any
) -> Scene:
    """What candidates draw: classes in turn, prompts in turn, or nothing in particular."""
    if backbone_of(record.model_config).wants != "text":
        return open_scene([record], sample, **place)
    return open_scene(
        [record], replace(sample, per_prompt=1), prompts=_prompts(images, sample), **place
    )


def _prompts(images: DataConfig, sample: SampleConfig) -> PromptSet:
    """The prompts of [sample], else the captions of the training images, from the first on."""
    if sample.prompts:
        return replace(read_prompts(sample.prompts, column=sample.prompt_column), cycles=True)
    data = open_images(
        images.source, shape=(3, 8, 8), wants="text", captions=images.captions, keep=False
    )
    captions = data.captions(range(len(data)))
    return PromptSet(f"captions of {images.source}", tuple(captions), cycles=True)


def _noise(seed: int, shape: Shape, draws: Tensor) -> Tensor:
    """Standard normal noise (B, *shape), that of each draw from its own seed."""
    generator = torch.Generator()
    seeds = [image_seed(seed, index) for index in draws.tolist()]
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(s)) for s in seeds])
