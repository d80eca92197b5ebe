"""What a search of the coefficients minimises, on the same draws for every candidate.

`loss` is the denoising loss on held-out images; `fid` the Fréchet distance between images the
candidate makes and the training images. Draw i and image i depend on (seed, i) alone, so candidates
differ in their weights and in nothing else. The seed is the search's own: what reports the result
later must use others.
B batch, C channels, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from deme_cli.config import MergeConfig, SampleConfig
from deme_cli.data.images import ImageData, open_images, to_unit
from deme_cli.diffusion.denoiser import Denoiser, predict
from deme_cli.diffusion.schedule import NoiseSchedule, add_noise
from deme_cli.errors import NumericsError
from deme_cli.evaluation.frechet import RunningStatistics, Statistics, frechet_distance
from deme_cli.sampling.sampler import ImageBatch, image_seed, sample_images, single

if TYPE_CHECKING:
    from deme_cli.evaluation.features import Extractor

Check = Callable[[], None]  # called between batches; raises to stop


class Objective(Protocol):
    """A number per denoiser, smaller is better; not finite where the candidate is broken."""

    label: str  # as people call it
    protocol: dict[str, Any]  # everything the number depends on, besides the candidate

    def __call__(self, denoiser: Denoiser, check: Check) -> float: ...


class HeldOutLoss:
    """Mean of (target - output)^2 over `num` draws of (x_0, t, eps), t uniform on [0, T) (Eq. 2).

    The draws of t are stratified, one from each of `num` equal parts of [0, T): the same mean with
    less variance. Images come in shuffled rounds, so each is used equally often.
    """

    label = "held-out loss"

    def __init__(self, data: ImageData, schedule: NoiseSchedule, config: MergeConfig) -> None:
        self._data, self._schedule, self._batch_size = data, schedule, config.batch_size
        generator = torch.Generator().manual_seed(config.seed)
        rounds = -(-config.num // len(data))
        order = [torch.randperm(len(data), generator=generator) for _ in range(rounds)]
        self._images = torch.cat(order)[: config.num]  # (num,)
        place = torch.rand(config.num, generator=generator, dtype=torch.float64)
        strata = (torch.arange(config.num) + place) / config.num * schedule.num_train_timesteps
        self._t = strata.long()[torch.randperm(config.num, generator=generator)]  # (num,)
        self._seeds = [image_seed(config.seed, index) for index in range(config.num)]
        self.protocol = {
            "name": "loss",
            "data": data.source,
            "data_fingerprint": data.fingerprint,
            "split": "held-out",
            "num": config.num,
            "seed": config.seed,
        }

    @torch.inference_mode()
    def __call__(self, denoiser: Denoiser, check: Check) -> float:
        total = 0.0
        for chosen in torch.arange(len(self._t)).split(self._batch_size):
            check()
            x0 = to_unit(self._data.batch(self._images[chosen].tolist()))
            eps = _noise([self._seeds[index] for index in chosen.tolist()], x0.shape[1:])
            t = self._t[chosen]
            x_t = add_noise(x0, eps, t, self._schedule.alphas_cumprod)
            target = self._schedule.target(x0, eps, t)
            x_t, t = x_t.to(denoiser.device, denoiser.dtype), t.to(denoiser.device)
            output = predict(denoiser.network, x_t, t).float().cpu()
            total += (output - target).square().sum(dtype=torch.float64).item()
        return total / (len(self._t) * int(np.prod(denoiser.sample_shape)))


class GeneratedDistance:
    """Fréchet distance between the features of `sample.num` generated images and of a reference."""

    def __init__(
        self, extractor: Extractor, reference: Statistics, source: str, *, sample: SampleConfig
    ) -> None:
        self._extractor, self._reference, self._sample = extractor, reference, sample
        on_inception = extractor.metric_name == "fid"
        self.label = "FID" if on_inception else f"Fréchet distance on {extractor.name}"
        self.protocol = {
            "name": extractor.metric_name,
            "extractor": {"name": extractor.name, "sha256": extractor.sha256},
            "reference": source,
            "reference_n": reference.n,
            "split": "train",
            **{key: value for key, value in asdict(sample).items() if key != "batch_size"},
        }

    def __call__(self, denoiser: Denoiser, check: Check) -> float:
        statistics = RunningStatistics()
        try:
            for record in sample_images(single(denoiser), self._sample):
                check()
                if isinstance(record, ImageBatch):
                    statistics.add(self._extractor.features(record.images))
            found, reference = statistics.statistics(), self._reference
            return frechet_distance(found.mu, found.sigma, reference.mu, reference.sigma)
        except NumericsError:
            return float("nan")  # this candidate's images are not finite; the others may be


def open_objective(
    config: MergeConfig,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    *,
    images: str,
    sample: SampleConfig,
    features: str,
    resize: str,
    device: str,
) -> Objective:
    """The objective that `config` names, on the run's `images`.

    shape: (C, H, W) of the model's images. `features` and `resize` are those of the distance, and
    `sample` how its images are drawn.
    """
    if config.objective == "loss":
        return HeldOutLoss(open_images(images, shape=shape, split="held-out"), schedule, config)
    from deme_cli.evaluation.features import load_extractor
    from deme_cli.evaluation.references import reference_statistics

    extractor = load_extractor(features, resize=resize, device=device)
    reference = reference_statistics(images, extractor, split="train")
    return GeneratedDistance(extractor, reference, images, sample=sample)


def _noise(seeds: list[int], shape: torch.Size) -> Tensor:
    """Standard normal noise (B, *shape), each image from its own seed."""
    generator = torch.Generator()
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(s)) for s in seeds])
