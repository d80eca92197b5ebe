"""How alike the gradients of timesteps are: one mean gradient per bucket, and the cosines between.

(The paper's figure 1; Go et al. 2023, ANT, section 3.1.) Per bucket of timesteps: the gradient of
the plain denoising loss over `num` draws (image, t, eps), as a sketch (sketch.py), so that memory
does not grow with buckets times parameters. Images come in shuffled rounds, t evenly from the
bucket's draws; each bucket's draws are a function of (seed, bucket) alone. The two halves of its
draws give two means, whose cosine is the bucket's reliability: with noise of variance v in each of
them it is |g|^2 / (|g|^2 + v), and cosines between buckets shrink likewise.
n buckets, m numbers per sketch.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deme_cli.analysis.draws import identity_of, part, spread_draws
from deme_cli.analysis.gradients.sketch import (
    CountSketch,
    cosines,
    gradients,
    inner_products,
    sketch_of,
)
from deme_cli.analysis.unfinished import Step, Unfinished
from deme_cli.analysis_config import GradientConfig, bucket_ranges
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.errors import NumericsError
from deme_cli.timesteps import TimestepRange
from deme_cli.training.affinity import Affinity
from deme_cli.training.clusters import split_times
from deme_cli.training.examples import Examples
from deme_cli.training.held_out import Check, FixedDraws


@dataclass(frozen=True)
class GradientAnalysis:
    """What is measured, opened; `model` is what the user called it."""

    denoiser: Denoiser
    examples: Examples
    config: GradientConfig
    output: Path
    model: str
    num_ranges: int

    @property
    def buckets(self) -> list[TimestepRange]:
        return bucket_ranges(self.config.buckets, self.denoiser.schedule.num_train_timesteps)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: finished buckets are used again only if all of it agrees."""
        return {
            "model": self.denoiser.record.fingerprint,
            **identity_of(self.denoiser.record, self.examples),
            "buckets": self.config.buckets,
            "num": self.config.num,
            "seed": self.config.seed,
        }


@dataclass(frozen=True)
class MeanGradient:
    """Of one bucket: the loss, the sketch of its gradient (m,) float32, cosine of its halves."""

    loss: float
    sketch: np.ndarray
    reliability: float


def measure_gradients(
    analysis: GradientAnalysis, *, force: bool = False
) -> Generator[Step | Affinity]:
    """Measure every bucket; yields a `Step` per half of one, and the `Affinity` last.

    Finished buckets are kept beside the output until the caller discards them, and used again
    unless `force`. Raises NumericsError on a gradient that is not finite, ConfigError on a bucket
    in which a flow schedule has no time, Stopped after a signal.
    """
    num, buckets = analysis.config.num, analysis.buckets
    for bucket in buckets:
        analysis.denoiser.schedule.indices(bucket)
    sketch = sketch_of(analysis.denoiser.network)
    with Unfinished(analysis.output, analysis.identity, force=force) as kept:
        found = kept.arrays = kept.arrays or _empty(len(buckets), sketch.size)
        first = int(np.isfinite(found["losses"]).sum())
        note = f"continuing after {first} of {len(buckets)} buckets" if first else kept.note
        yield Step(first * num, note)
        for index in range(first, len(buckets)):
            kept.done = f"{index} of {len(buckets)} buckets"
            for step in _measure(analysis, index, sketch, kept.check):
                if isinstance(step, MeanGradient):
                    found["sketches"][index], found["losses"][index] = step.sketch, step.loss
                    found["reliability"][index] = step.reliability
                else:
                    yield Step(index * num + step)
            kept.save_now_and_then()
            yield Step((index + 1) * num)
        yield _affinity(analysis, sketch, found)


def _empty(num_buckets: int, size: int) -> dict[str, np.ndarray]:
    """Places for what is found; a loss that is not finite marks a bucket still to be measured."""
    return {
        "sketches": np.zeros((num_buckets, size), np.float32),
        "losses": np.full(num_buckets, np.nan),
        "reliability": np.full(num_buckets, np.nan),
    }


def _measure(
    analysis: GradientAnalysis, index: int, sketch: CountSketch, check: Check
) -> Iterator[int | MeanGradient]:
    """One bucket: yields the number of draws after its first half, then what was found."""
    network, num = analysis.denoiser.network, analysis.config.num
    losses, halves = [], []
    parts = _draws(analysis, index)
    for half in parts:
        losses.append(half.loss_and_gradient(network, check))
        halves.append(sketch(gradients(network)))
        if not math.isfinite(losses[-1]) or not np.isfinite(halves[-1]).all():
            raise NumericsError(
                f"{analysis.model}: the gradient of timesteps {analysis.buckets[index]} is not "
                f"finite (loss {losses[-1]:.4g}); the model's weights are broken"
            )
        if len(halves) == 1:
            yield len(half.t)
    network.zero_grad(set_to_none=True)
    share = [len(half.t) / num for half in parts]
    mean = np.average(halves, axis=0, weights=share).astype(np.float32)
    agreement = cosines(inner_products(np.array(halves)))[0, 1]
    yield MeanGradient(float(np.dot(losses, share)), mean, float(agreement))


def _draws(analysis: GradientAnalysis, index: int) -> list[FixedDraws]:
    """The draws of a bucket in two halves."""
    config, num = analysis.config, analysis.config.num
    draws = spread_draws(
        analysis.examples, analysis.denoiser.schedule, [analysis.buckets[index]], num,
        seed=config.seed, purpose="gradients", batch_size=config.batch_size,
    )  # fmt: skip
    return [part(draws, range(num // 2)), part(draws, range(num // 2, num))]


def _affinity(
    analysis: GradientAnalysis, sketch: CountSketch, found: dict[str, np.ndarray]
) -> Affinity:
    """What the mean gradients say together, with the clusters they suggest."""
    products = inner_products(found["sketches"])
    norms = np.sqrt(np.diagonal(products))
    schedule, record = analysis.denoiser.schedule, analysis.denoiser.record
    affinity = Affinity(
        buckets=analysis.buckets,
        cosines=[[round(value, 6) for value in row] for row in cosines(products).tolist()],
        norms=norms.tolist(),
        losses=found["losses"].tolist(),
        reliability=[round(value, 6) for value in found["reliability"].tolist()],
        model={"source": analysis.model, "fingerprint": record.fingerprint},
        data={"source": analysis.examples.source, "fingerprint": analysis.examples.fingerprint},
        num=analysis.config.num,
        seed=analysis.config.seed,
        parameters=sketch.parameters,
        sketch_size=sketch.size,
        standard_error=sketch.standard_error,
        ranges=[],
    )
    ranges = split_times(analysis.num_ranges, "gradient", schedule, affinity)
    return replace(affinity, ranges=ranges)
