"""Where each model gained and where it lost: the denoising loss against the timestep.

[0, T) is divided into n buckets with as many draws (x_0, t, eps) each. Every model sees the same
draws, so the difference of two of them is paired draw by draw; the ensemble's error at a draw is
that of the expert whose range holds its timestep (Eq. 7), and costs no forward of its own.
Intervals are those of intervals.py.
k models, m draws in all. The loss is that of the network's own target (eps, x_0, v or a velocity).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deme_cli.analysis.draws import identity_of, spread_draws
from deme_cli.analysis.intervals import Estimate, estimate
from deme_cli.analysis.lineup import Entrant
from deme_cli.analysis.unfinished import Step, Unfinished
from deme_cli.analysis_config import LossConfig, bucket_ranges
from deme_cli.diffusion.schedule import Schedule
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.timesteps import TimestepRange, require_cover, route
from deme_cli.training.examples import Examples
from deme_cli.training.held_out import FixedDraws

_BATCHES = 8  # between two looks at the clock
Values = np.ndarray  # of floats


@dataclass(frozen=True)
class Curve:
    """One model: its losses by bucket, and its differences to the first model (0 of that itself).

    losses, halves, differences, difference_halves: (n,), the halves those of 95 % intervals.
    by_range: the differences over each range; overall: over all draws.
    """

    name: str
    kind: str
    span: TimestepRange | None
    losses: Values
    halves: Values
    differences: Values
    difference_halves: Values
    range_losses: list[float]
    by_range: list[Estimate]
    overall: Estimate
    loss: float


@dataclass(frozen=True)
class Losses:
    """The curves of a line-up, the first the one that others are compared with."""

    curves: list[Curve]
    buckets: list[TimestepRange]
    ranges: list[TimestepRange]
    num_images: int


@dataclass(frozen=True)
class LossAnalysis:
    """What is measured, opened. `ranges` are those that losses are summed up over."""

    entrants: Sequence[Entrant]
    examples: Examples
    schedule: Schedule
    config: LossConfig
    ranges: Sequence[TimestepRange]
    split: str
    output: Path
    dtype: str = "fp32"

    @property
    def buckets(self) -> list[TimestepRange]:
        return bucket_ranges(self.config.buckets, self.schedule.num_train_timesteps)

    @property
    def alone(self) -> list[Entrant]:
        """The models that are one network; an ensemble needs no forward of its own."""
        return [entrant for entrant in self.entrants if len(entrant.experts) == 1]

    @property
    def total(self) -> int:
        """Draws to be measured, of all models."""
        return len(self.alone) * self.config.buckets * self.config.num

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "models": [entrant.fingerprints for entrant in self.entrants],
            **identity_of(self.entrants[0].records[0], self.examples),
            "split": self.split,
            "buckets": self.config.buckets,
            "num": self.config.num,
            "batch size": self.config.batch_size,
            "seed": self.config.seed,
            "dtype": self.dtype,
        }


def own_ranges(entrants: Sequence[Entrant]) -> list[TimestepRange]:
    """The ranges of the first ensemble's experts; empty where there is none."""
    for entrant in entrants:
        if len(entrant.experts) > 1:
            return [expert.range for expert in entrant.experts]
    return []


def measure_losses(analysis: LossAnalysis, *, force: bool = False) -> Generator[Step | Losses]:
    """Measure every model on the same draws; yields a `Step` now and then, the `Losses` last.

    Finished draws are kept beside the output until the caller discards them. Raises NumericsError
    for a model whose loss is not finite, ConfigError for a bucket in which a flow schedule has no
    time, Stopped after a signal.
    """
    draws = fixed_draws(analysis)
    _require_draws(analysis, draws)
    alone, total, size = analysis.alone, len(draws.t), analysis.config.batch_size * _BATCHES
    with Unfinished(analysis.output, analysis.identity, force=force) as kept:
        errors = kept.arrays.setdefault("errors", np.full((len(alone), total), np.nan))
        done = int(np.isfinite(errors).sum())
        yield Step(done, "continuing with what was measured before" if done else kept.note)
        for entrant, row in zip(alone, errors, strict=True):
            first = int(np.isfinite(row).sum())
            if first == total:  # measured before
                continue
            network = entrant.experts[0].load().network
            for start in range(first, total, size):
                kept.done = f"{done} of {errors.size} draws"
                chosen = torch.arange(start, min(start + size, total))
                found = draws.errors(network, chosen=chosen, check=kept.check).numpy()
                if not np.isfinite(found).all():
                    raise NumericsError(
                        f"{entrant.name}: the loss is not finite; the model's weights are broken"
                    )
                row[start : start + len(chosen)] = found
                done += len(chosen)
                kept.save_now_and_then()
                yield Step(done)
        by_name = {entrant.name: row for entrant, row in zip(alone, errors, strict=True)}
        yield summarise(analysis, draws, by_name)


def fixed_draws(analysis: LossAnalysis) -> FixedDraws:
    """The same number of draws in each bucket, in order of buckets."""
    config = analysis.config
    return spread_draws(
        analysis.examples, analysis.schedule, analysis.buckets, config.num,
        seed=config.seed, purpose="losses", batch_size=config.batch_size,
    )  # fmt: skip


def summarise(analysis: LossAnalysis, draws: FixedDraws, errors: dict[str, Values]) -> Losses:
    """The curves, from the errors (m,) of every model that is one network."""
    images, times = draws.images.numpy(), draws.schedule.times(draws.t).tolist()
    whole = {entrant.name: _errors_of(entrant, errors, times) for entrant in analysis.entrants}
    first = whole[analysis.entrants[0].name]
    inside = [owners_of(times, analysis.ranges) == i for i in range(len(analysis.ranges))]
    curves = []
    for entrant in analysis.entrants:
        own = whole[entrant.name]
        paired = own - first
        losses, differences = (
            [estimate(*both) for both in _bucketed(values, images, analysis.config.num)]
            for values in (own, paired)
        )
        curves.append(
            Curve(
                entrant.name, entrant.kind, entrant.span, *_columns(losses), *_columns(differences),
                range_losses=[float(own[mine].mean()) for mine in inside],
                by_range=[estimate(paired[mine], images[mine]) for mine in inside],
                overall=estimate(paired, images), loss=float(own.mean()),
            )
        )  # fmt: skip
    num_images = len(np.unique(images))
    return Losses(curves, analysis.buckets, list(analysis.ranges), num_images)


def _errors_of(entrant: Entrant, errors: dict[str, Values], times: Sequence[float]) -> Values:
    """The errors of a network, or of an ensemble: at each draw those of its expert."""
    if entrant.name in errors:
        return errors[entrant.name]
    spans = [expert.range for expert in entrant.experts]
    members = np.array([errors[name] for name in entrant.members])
    return members[owners_of(times, spans), np.arange(len(times))]


def owners_of(times: Sequence[float], ranges: Sequence[TimestepRange]) -> np.ndarray:
    """Which range each time lies in: (m,)."""
    return np.array([route(t, ranges) for t in times])


def _require_draws(analysis: LossAnalysis, draws: FixedDraws) -> None:
    """Check that the ranges cover [0, T) once and that draws lie in each of them."""
    require_cover(analysis.ranges, analysis.schedule.num_train_timesteps)
    owners = owners_of(draws.schedule.times(draws.t).tolist(), analysis.ranges)
    for index, span in enumerate(analysis.ranges):
        if index not in owners:
            raise ConfigError(f"no draw lies in range {span}; choose more --buckets or --num")


def _bucketed(values: Values, images: Values, num: int) -> Iterator[tuple[Values, Values]]:
    return zip(values.reshape(-1, num), images.reshape(-1, num), strict=True)


def _columns(estimates: Sequence[Estimate]) -> tuple[Values, Values]:
    return np.array([e.mean for e in estimates]), np.array([e.half for e in estimates])
