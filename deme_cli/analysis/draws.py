"""What every model of an analysis sees: images, and draws (x_0, t, eps) of them fixed by a seed.

In each of some spans of timesteps the same number of draws, t evenly over the span and in random
order; images in shuffled rounds over all draws, so that each is used equally often. All of it is a
function of the seed, the kind of analysis, and the spans; noise is one of (seed, number of the
draw), so nothing depends on the batch size. And how far a mean over draws is off.
m draws or values, G clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deme_cli.analysis.settings import DrawConfig
from deme_cli.artifacts import DenoiserRecord
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.console import Progress
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser, choose_device
from deme_cli.diffusion.projection import PREFIX, attach_projections, has_projections
from deme_cli.diffusion.schedule import Schedule, complete_config
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.run_file import RunFile
from deme_cli.sampling.sampler import seeded_noise
from deme_cli.timesteps import TimestepRange
from deme_cli.training.batches import FixedDraws, derived_generator
from deme_cli.training.examples import Examples, fill_caches, name_companions, open_examples

INTERVALS = "95 %, over images (draws of one image are a cluster)"


def open_models(
    arguments: Sequence[str], *, run: RunFile | None = None, pipeline: str | None,
    device: str = "cpu", dtype: str = "fp32",
) -> list[Denoiser]:  # fmt: skip
    """The denoisers that these arguments name, of one shape; block projections that some lack are
    added to them.

    Raises what `open_denoiser` and `require_alike` raise, ArtifactError naming the first parameter
    that they do not share.
    """
    place = str(choose_device(device))
    opened = [
        open_denoiser(a, run=run, pipeline=pipeline, device=place, dtype=dtype) for a in arguments
    ]
    require_alike(list(zip(arguments, (one.record for one in opened), strict=True)))
    have = [has_projections(one.network.state_dict()) for one in opened]
    for one, has_own in zip(opened, have, strict=True):
        if any(have) and not has_own:
            attach_projections(one.network, "block")
            one.network.get_submodule(PREFIX).to(one.device, one.dtype).requires_grad_(False)
    shapes = [{n: list(w.shape) for n, w in one.network.state_dict().items()} for one in opened]
    for argument, own in zip(arguments, shapes, strict=True):
        for name in sorted(own.keys() | shapes[0].keys()):
            if own.get(name) != shapes[0].get(name):
                raise ArtifactError(
                    f"{argument}: {name!r} has shape {own.get(name)}, {arguments[0]} has "
                    f"{shapes[0].get(name)}; compare models of one base"
                )
    return opened


def require_alike(models: Sequence[tuple[str, DenoiserRecord]]) -> None:
    """Check that models of these names can be asked the same; raises ArtifactError otherwise."""

    def asked(record: DenoiserRecord) -> dict[str, Any]:
        config = record.model_config
        return {
            "shape of x_t": backbone_of(config).sample_shape(config),
            "number of timesteps": record.num_train_timesteps,
            "scheduler config": complete_config(record.scheduler_config),
        }

    first, own = models[0][0], asked(models[0][1])
    for name, record in models[1:]:
        for what, theirs in asked(record).items():
            if theirs != own[what]:
                raise ArtifactError(
                    f"{name}: another {what} than {first} ({theirs}, not {own[what]}); compare "
                    f"models of one base"
                )


def open_images(
    record: DenoiserRecord, images: DataConfig, split: str, *, run: RunFile, output: Path,
    pipeline: str | None, device: str, progress: Progress,
) -> tuple[Examples, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The images as a model of this record takes them, which they are as a protocol has it, and
    what else decides what it sees of them.

    Latents are cached in a hidden folder beside `output`. Raises what `open_companions` and
    `open_examples` raise.
    """
    pipeline = run.pipeline(pipeline)
    record = name_companions(record, pipeline)
    companions = open_companions(record, pipeline=pipeline, device=str(choose_device(device)))
    cache = run.settings(FinetuneConfig).cache
    examples = open_examples(images, companions, split=split, cache=cache, beside=output.parent)
    fill_caches(examples, progress=progress)
    data = {"source": examples.source, "fingerprint": examples.fingerprint, "split": split}
    rest = {"shape": examples.image_shape, "scheduler": record.scheduler_config}
    return examples, data, {**rest, "companions": record.companions}


def spread_draws(
    examples: Examples, schedule: Schedule, spans: Sequence[TimestepRange], settings: DrawConfig
) -> FixedDraws:
    """As many draws in each span as the settings say, in the order of spans.

    Raises ConfigError where a flow schedule has no time in a span.
    """
    num = settings.num
    generator = derived_generator(settings.seed, type(settings).__name__, *spans)
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
    return FixedDraws(examples, schedule, images, torch.cat(times), noise, settings.batch_size)


def part(draws: FixedDraws, chosen: range) -> FixedDraws:
    """Some successive draws as draws of their own."""
    own = slice(chosen.start, chosen.stop)

    def noise(numbers: Tensor) -> Tensor:
        return draws.noise(numbers + chosen.start)

    return replace(draws, images=draws.images[own], t=draws.t[own], noise=noise)


def draws_in(draws: FixedDraws, spans: Sequence[TimestepRange], *, least: int = 1) -> np.ndarray:
    """Which draws have their time in each span: (spans, m) bool. T, where flows begin, is T - 1.

    Raises ConfigError where a span has fewer than `least` draws; an error is told of two.
    """
    whole = draws.schedule.num_train_timesteps
    times = draws.schedule.times(draws.t).clamp(max=whole - 1).numpy()
    masks = np.array([(times >= span.start) & (times < span.stop) for span in spans])
    for span, mask in zip(spans, masks, strict=True):
        if mask.sum() < least:
            raise ConfigError(
                f"timesteps {span} have {mask.sum()} of {len(mask)} draws; raise --num, or tell "
                f"fewer ranges apart"
            )
    return masks


class Estimate(NamedTuple):
    """A mean over draws and the half-width of its 95 % interval; nan for one image alone."""

    mean: float
    half: float


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
