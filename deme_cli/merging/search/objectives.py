"""What a search of the coefficients minimises, on the same draws for every candidate.

`loss` is the denoising loss on held-out images, `experts` the distance to what the experts say,
`kid` and `fid` distances between images that the candidate makes and real ones. A workbench opens
them, for a search and, on other seeds and data, for the report of what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from deme_cli.artifacts import DenoiserRecord
from deme_cli.config import DataConfig, MergeConfig, SampleConfig
from deme_cli.data.images import open_images
from deme_cli.data.prompts import PromptSet, read_prompts
from deme_cli.diffusion.backbones.known import backbone_of
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.evaluation.features import Extractor, load_extractor
from deme_cli.evaluation.frechet import Statistics
from deme_cli.evaluation.references import Reference, find_reference, open_reference
from deme_cli.ladder import Rung
from deme_cli.merging.search.distances import FeatureStore, GeneratedDistance
from deme_cli.merging.search.losses import ExpertsLoss, HeldOutLoss
from deme_cli.merging.search.measure import Measure
from deme_cli.sampling.conditioning import Conditioning, open_conditioning
from deme_cli.sampling.ensemble import SamplingExpert
from deme_cli.sampling.scheduler import name_sampler
from deme_cli.training.examples import Examples, name_companions, open_examples
from deme_cli.training.held_out import Check

SEARCH, REPORT = 0, 1  # the part of the held-out images, and which reference


class Objective(Protocol):
    """A number per model, smaller is better; not finite where the candidate is broken.

    `key` names the candidate, so that what was drawn of it before need not be drawn again.
    """

    name: str  # as JSON has it
    label: str  # as people call it
    protocol: dict[str, Any]  # everything the number depends on, besides the candidate

    def __call__(self, experts: Sequence[SamplingExpert], check: Check, key: str = "") -> float: ...


class Workbench:
    """Opens objectives for candidates like `record`; networks and images are loaded once."""

    def __init__(
        self, measure: Measure, record: DenoiserRecord, *, store: FeatureStore | None = None
    ) -> None:
        self.measure, self.store = measure, store
        self.record = name_companions(record, measure.pipeline)

    def open(
        self,
        rung: Rung,
        config: MergeConfig,
        *,
        part: int = SEARCH,
        experts: Callable[[], Sequence[SamplingExpert]] | None = None,
    ) -> Objective:
        """The objective of a rung with the seed of `config`; part: SEARCH or REPORT.

        experts: those of an ensemble, for the objective `experts`.
        """
        config = replace(config, num=rung.num)
        if rung.is_distance:
            return self._distance(rung, config, part)
        schedule = read_schedule(self.record.scheduler_config)
        if rung.name == "loss":
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

    def _distance(self, rung: Rung, config: MergeConfig, part: int) -> GeneratedDistance:
        sample = replace(
            self.measure.sample, num=config.num, steps=config.steps, seed=config.seed,
            batch_size=config.batch_size,
        )  # fmt: skip
        sample = name_sampler(self.record, sample)
        conditioning = self._conditioning(sample)
        reference, card = self._reference(rung.name == "kid", part, conditioning)
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
