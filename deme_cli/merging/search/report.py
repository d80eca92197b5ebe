"""The honest figures: what was chosen on one set of seeds and images, measured on another.

Every row is measured by the same objectives with seeds of the report and, where there are any, on
images the search has not seen. Rows share their draws and their noise, so a row is told by its
difference to the base, with an interval from a paired bootstrap (Efron & Tibshirani 1993) over
images. The gain kept is the share of the ensemble's gain that a single network keeps:

    (base - row) / (base - ensemble)

n draws or images of a seed, R seeds, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deme_cli.errors import NumericsError
from deme_cli.merging.search.distances import GeneratedDistance
from deme_cli.merging.search.losses import HeldOutLoss
from deme_cli.merging.search.objectives import Objective
from deme_cli.sampling.sampler import SamplingExpert
from deme_cli.timesteps import TimestepRange
from deme_cli.training.held_out import Check

RESAMPLES, WIDE_RESAMPLES, WIDE = 200, 25, 512  # fewer where features are many: each costs d^3
BASE, ENSEMBLE = "base", "ensemble"
Model = Callable[[], Sequence[SamplingExpert]]


@dataclass(frozen=True)
class Estimate:
    """One metric of one row, the mean over seeds, and its difference to the base.

    `interval` holds the difference plus and minus 1.96 bootstrap standard errors; `gain_kept` is
    None for the base, the ensemble itself, and where the ensemble gained nothing. Where the row is
    not finite, neither are its difference and interval.
    """

    value: float
    values: tuple[float, ...]
    difference: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    gain_kept: float | None = None


@dataclass(frozen=True)
class ReportRow:
    """A model of the report: its coefficients as recorded, and its estimates by metric."""

    name: str
    coefficients: Sequence[float] | None
    metrics: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        coefficients = None if self.coefficients is None else list(self.coefficients)
        return {
            "name": self.name,
            "coefficients": coefficients,
            "metrics": {
                metric: {
                    "value": _finite(estimate.value),
                    "values": [_finite(value) for value in estimate.values],
                    "difference": _finite(estimate.difference),
                    "interval": [_finite(end) for end in estimate.interval],
                    "gain_kept": estimate.gain_kept,
                }
                for metric, estimate in self.metrics.items()
            },
        }  # fmt: skip


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if np.isfinite(value) else None


@dataclass(frozen=True)
class Meter:
    """One metric of the report, opened once for each of R seeds."""

    objectives: Sequence[Objective]

    @property
    def protocol(self) -> dict[str, Any]:
        return {**self.objectives[0].protocol, "seeds": len(self.objectives)}


def measure_rows(
    rows: Sequence[tuple[str, Sequence[float] | None, Model]],
    meters: Sequence[Meter],
    ranges: Sequence[TimestepRange],
    check: Check,
) -> Iterator[ReportRow]:
    """Measure the rows in order; the base comes first, then the ensemble if there is one.

    `ranges` are those of the experts: a loss is told for each of them, as `loss 250:500`, besides
    the whole. Raises NumericsError where the base itself is not finite.
    """
    base: dict[str, list[_Sample]] = {}
    gains: dict[str, float] = {}
    for name, coefficients, model in rows:
        found: dict[str, Estimate] = {}
        for meter in meters:
            samples = _samples(meter, model, ranges, check)
            for metric, taken in samples.items():
                first = base.setdefault(metric, taken)
                found[metric] = estimate = _estimate(taken, first, gains.get(metric))
                if name == ENSEMBLE:
                    gains[metric] = -estimate.difference
        if name == BASE and not all(np.isfinite(e.value) for e in found.values()):
            raise NumericsError("the base's own figures are not finite; try --dtype fp32")
        yield ReportRow(name, coefficients, found)


@dataclass(frozen=True)
class _Sample:
    """What a row gave for one seed: its value, and how to take it again of resampled images."""

    value: float
    size: int
    again: Callable[[np.ndarray], float]
    resamples: int = RESAMPLES
    units: tuple[int, ...] = ()  # numbers of the images, where other seeds have the same


def _samples(
    meter: Meter, model: Model, ranges: Sequence[TimestepRange], check: Check
) -> dict[str, list[_Sample]]:
    """The samples of one row by metric, one for each seed."""
    found: dict[str, list[_Sample]] = {}
    for objective in meter.objectives:
        if isinstance(objective, GeneratedDistance):
            found.setdefault(objective.name, []).append(_of_distance(objective, model(), check))
            continue
        assert isinstance(objective, HeldOutLoss)
        errors = objective.errors(model(), check).numpy()
        images = objective.draws.images.numpy()
        found.setdefault(objective.name, []).append(_of_errors(errors, images))
        if len(ranges) > 1:
            for span in ranges:
                mine = objective.draws_in(span).numpy()  # a t may belong to no expert
                if mine.any():
                    name = f"{objective.name} {span}"
                    found.setdefault(name, []).append(_of_errors(errors[mine], images[mine]))
    return found


def _of_errors(errors: np.ndarray, images: np.ndarray) -> _Sample:
    """A mean over draws; the bootstrap draws images, with all their draws in every seed."""
    known, place = np.unique(images, return_inverse=True)
    totals, counts = np.bincount(place, weights=errors), np.bincount(place)

    def again(chosen: np.ndarray) -> float:
        return float(totals[chosen].sum() / counts[chosen].sum())

    return _Sample(float(errors.mean()), len(known), again, units=tuple(known.tolist()))


def _of_distance(
    objective: GeneratedDistance, model: Sequence[SamplingExpert], check: Check
) -> _Sample:
    """A distance of generated images; the bootstrap draws among them."""
    try:
        features = objective.features(model, check)
    except NumericsError:
        return _Sample(float("nan"), 1, lambda chosen: float("nan"), 1)
    resamples = RESAMPLES if features.shape[1] <= WIDE else WIDE_RESAMPLES
    if objective.is_kernel:
        resamples = WIDE_RESAMPLES  # a mean over many subsets: each costs as much as a hundred
    return _Sample(
        objective.distance(features), len(features),
        lambda chosen: objective.distance(features[chosen]), resamples,
    )  # fmt: skip


def _estimate(row: list[_Sample], base: list[_Sample], gain: float | None) -> Estimate:
    """The mean over seeds, the difference to the base, its interval, and the gain kept."""
    values = tuple(sample.value for sample in row)
    value = float(np.mean(values))
    if not np.isfinite(value):
        return Estimate(value, values, float("nan"), (float("nan"), float("nan")))
    if row is base:
        return Estimate(value, values)
    difference = value - float(np.mean([sample.value for sample in base]))
    draw = np.random.default_rng(0)
    resampled = []
    for _ in range(row[0].resamples):
        chosen = [draw.integers(0, sample.size, sample.size) for sample in row]
        if row[0].units and all(sample.units == row[0].units for sample in row):
            chosen = chosen[:1] * len(row)  # the seeds share their images
        pairs = zip(row, base, chosen, strict=True)
        resampled.append(np.mean([a.again(index) - b.again(index) for a, b, index in pairs]))
    half = 1.96 * float(np.std(resampled, ddof=1))
    kept = -difference / gain if gain is not None and gain > 0 else None
    return Estimate(value, values, difference, (difference - half, difference + half), kept)
