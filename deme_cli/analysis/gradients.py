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

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from deme_cli.analysis.sketch import CountSketch, cosines, gradients, inner_products, sketch_of
from deme_cli.artifacts import fingerprint, load_tensors, write_artifact
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.interrupts import StopRequests
from deme_cli.outputs import claim
from deme_cli.records import Record
from deme_cli.sampling.sampler import seeded_noise
from deme_cli.tensor_file import read_header
from deme_cli.timesteps import TimestepRange
from deme_cli.training.affinity import Affinity, GradientConfig
from deme_cli.training.batches import derived_generator
from deme_cli.training.clusters import split_times
from deme_cli.training.examples import Examples
from deme_cli.training.held_out import Check, FixedDraws

_KEEP_SECONDS = 30.0  # between two writings of the finished buckets


@dataclass(frozen=True)
class Analysis:
    """What is measured, opened; `model` is what the user called it."""

    denoiser: Denoiser
    examples: Examples
    config: GradientConfig
    output: Path
    model: str
    num_ranges: int

    @property
    def buckets(self) -> list[TimestepRange]:
        return self.config.parts(self.denoiser.schedule.num_train_timesteps)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: finished buckets are used again only if all of it agrees."""
        return {
            "model": self.denoiser.record.fingerprint,
            "scheduler": self.denoiser.record.scheduler_config,
            "companions": self.denoiser.record.companions,
            "data": self.examples.fingerprint,
            "shape": list(self.examples.image_shape),
            "buckets": self.config.buckets,
            "num": self.config.num,
            "seed": self.config.seed,
        }


@dataclass(frozen=True)
class GradientStep:
    """`done` of all draws; `note` once, on finished buckets that were kept or had to be dropped."""

    done: int
    note: str = ""


@dataclass(frozen=True)
class MeanGradient:
    """Of one bucket: the loss, the sketch of its gradient (m,) float32, cosine of its halves."""

    loss: float
    sketch: np.ndarray
    reliability: float


@dataclass(frozen=True, kw_only=True)
class SketchesRecord(Record):
    """The header of the file of finished buckets. Not an artifact kind."""

    kind: ClassVar[str] = "sketches"
    identity: dict[str, Any]


def sketches_path(output: Path) -> Path:
    """Where the finished buckets of an analysis lie; hidden, beside its output."""
    return output.parent / f".{output.stem}.sketches"


def measure_gradients(
    analysis: Analysis, *, force: bool = False
) -> Iterator[GradientStep | Affinity]:
    """Measure every bucket; yields a `GradientStep` per half of one, and the `Affinity` last.

    Finished buckets are kept beside the output until the caller drops them, and used again unless
    `force`. Raises NumericsError on a gradient that is not finite, ConfigError on a bucket in which
    a flow schedule has no time, Stopped after a signal.
    """
    num, buckets, kept = analysis.config.num, analysis.buckets, sketches_path(analysis.output)
    for bucket in buckets:
        analysis.denoiser.schedule.indices(bucket)
    with ExitStack() as stack:
        stack.enter_context(claim(analysis.output))
        requests = stack.enter_context(StopRequests())
        if force:
            kept.unlink(missing_ok=True)
        done, note = _restore(kept, analysis.identity)
        yield GradientStep(len(done) * num, note)

        def check() -> None:
            if requests.asked:
                _keep(kept, done, analysis.identity)
                raise requests.stopped(
                    f"stopped after {len(done)} of {len(buckets)} buckets; run the same command "
                    f"again to continue"
                )

        sketch, last = sketch_of(analysis.denoiser.network), time.monotonic()
        for index in range(len(done), len(buckets)):
            for step in _measure(analysis, index, sketch, check):
                if isinstance(step, MeanGradient):
                    done.append(step)
                else:
                    yield GradientStep(index * num + step)
            if time.monotonic() - last > _KEEP_SECONDS:
                _keep(kept, done, analysis.identity)
                last = time.monotonic()
            yield GradientStep((index + 1) * num)
        yield _affinity(analysis, sketch, done)


def _measure(
    analysis: Analysis, index: int, sketch: CountSketch, check: Check
) -> Iterator[int | MeanGradient]:
    """One bucket: yields the number of draws after its first half, then what was found."""
    network, num = analysis.denoiser.network, analysis.config.num
    losses, halves = [], []
    parts = _draws(analysis, index)
    for part in parts:
        losses.append(part.loss_and_gradient(network, check))
        halves.append(sketch(gradients(network)))
        if not math.isfinite(losses[-1]) or not np.isfinite(halves[-1]).all():
            raise NumericsError(
                f"{analysis.model}: the gradient of timesteps {analysis.buckets[index]} is not "
                f"finite (loss {losses[-1]:.4g}); the model's weights are broken"
            )
        if len(halves) == 1:
            yield len(part.t)
    network.zero_grad(set_to_none=True)
    share = [len(part.t) / num for part in parts]
    mean = np.average(halves, axis=0, weights=share).astype(np.float32)
    agreement = cosines(inner_products(np.array(halves)))[0, 1]
    yield MeanGradient(float(np.dot(losses, share)), mean, float(agreement))


def _draws(analysis: Analysis, index: int) -> list[FixedDraws]:
    """The draws of a bucket in two halves."""
    examples, config = analysis.examples, analysis.config
    schedule, num = analysis.denoiser.schedule, config.num
    rows = schedule.indices(analysis.buckets[index])
    generator = derived_generator(config.seed, "gradients", analysis.buckets[index])
    t = rows.start + torch.arange(num) * len(rows) // num
    t = t[torch.randperm(num, generator=generator)]
    rounds = -(-num // len(examples))
    order = [torch.randperm(len(examples), generator=generator) for _ in range(rounds)]
    images = torch.cat(order)[:num]
    seed = int(torch.randint(1 << 62, (), generator=generator))

    def half(chosen: range) -> FixedDraws:
        def noise(draws: torch.Tensor) -> torch.Tensor:
            return seeded_noise(seed, examples.shape, [chosen[i] for i in draws.tolist()])

        own = slice(chosen.start, chosen.stop)
        return FixedDraws(examples, schedule, images[own], t[own], noise, config.batch_size)

    return [half(range(num // 2)), half(range(num // 2, num))]


def _affinity(analysis: Analysis, sketch: CountSketch, found: list[MeanGradient]) -> Affinity:
    """What the mean gradients say together, with the clusters they suggest."""
    products = inner_products(np.stack([one.sketch for one in found]))
    norms = np.sqrt(np.diagonal(products))
    schedule, record = analysis.denoiser.schedule, analysis.denoiser.record
    affinity = Affinity(
        buckets=analysis.buckets,
        cosines=[[round(value, 6) for value in row] for row in cosines(products).tolist()],
        norms=norms.tolist(),
        losses=[one.loss for one in found],
        reliability=[round(one.reliability, 6) for one in found],
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


def _keep(path: Path, done: list[MeanGradient], identity: dict[str, Any]) -> None:
    """Write the finished buckets, whole or not at all."""
    if done:
        tensors = {
            "sketches": np.stack([one.sketch for one in done]),
            "losses": np.array([one.loss for one in done]),
            "reliability": np.array([one.reliability for one in done]),
        }
        write_artifact(path, tensors, SketchesRecord(identity=identity))


def _restore(path: Path, identity: dict[str, Any]) -> tuple[list[MeanGradient], str]:
    """The finished buckets of an analysis with this identity, and what to say of them."""
    if not path.exists():
        return [], ""
    try:
        record = json.loads(read_header(path).metadata.get("deme", "{}"))
        tensors = load_tensors(path)
        if fingerprint(tensors) != record.get("fingerprint"):
            raise ArtifactError(f"{path}: damaged")
    except (ArtifactError, ValueError):
        return [], "the buckets measured before cannot be read; measuring all of them anew"
    kept = record["identity"]
    if changed := [name for name in identity if kept.get(name) != identity[name]]:
        names = ", ".join(changed)
        return [], f"buckets measured before had another {names}; measuring all of them anew"
    columns = [tensors[name] for name in ("losses", "sketches", "reliability")]
    done = [
        MeanGradient(float(loss), sketch.numpy(), float(reliability))
        for loss, sketch, reliability in zip(*columns, strict=True)
    ]
    return done, f"continuing after {len(done)} of {identity['buckets']} buckets"
