"""Measuring one row in one repeat: images, their features, their distances to the targets.

The seed moves every row together far more than rows differ, so in one repeat all rows start from
the same noise, and rows are compared by paired differences to the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import NumericsError
from deme_cli.evaluation.features import Extractor
from deme_cli.evaluation.frechet import RunningStatistics, Statistics, frechet_distance
from deme_cli.evaluation.kid import kernel_distance
from deme_cli.evaluation.rows import Row
from deme_cli.evaluation.targets import Target
from deme_cli.sampling.sampler import ImageBatch, sample_images


@dataclass(frozen=True, slots=True)
class MeasureProgress:
    """`done` of the `total` images of this row and repeat are drawn and looked at."""

    row: str
    repeat: int
    done: int
    total: int


@dataclass(frozen=True)
class Measured:
    """The distances of one row in one repeat, by metric, on n images."""

    row: str
    repeat: int
    n: int
    values: dict[str, float]

    @property
    def done(self) -> int:
        """All n images, as in MeasureProgress."""
        return self.n


def repeats_of(row: Row, config: EvalConfig) -> int:
    """Finished images have one repeat, whatever is asked of models."""
    return config.repeats if row.finished is None else 1


def seeds_of(row: Row, config: EvalConfig) -> list[int]:
    """The seed of every repeat; none for finished images."""
    if row.finished is not None:
        return []
    return [config.seed + repeat for repeat in range(config.repeats)]


def num_images(row: Row, config: EvalConfig) -> int:
    """Images of one repeat: as many as asked, or as there are."""
    return config.num if row.finished is None else min(config.num, len(row.finished))


def measure_row(
    row: Row,
    repeat: int,
    targets: Sequence[Target],
    extractor: Extractor,
    *,
    sample: SampleConfig,
    config: EvalConfig,
) -> Iterator[MeasureProgress | Measured]:
    """Draw the images of a repeat (its seed is config.seed + repeat) and take their distances.

    Yields progress, then the one Measured. Raises NumericsError on images, features or distances
    that are not finite.
    """
    n = num_images(row, config)
    sample = replace(sample, num=n, seed=config.seed + repeat)
    running, kept = RunningStatistics(), []
    for record in _images_of(row, sample):
        if isinstance(record, MeasureProgress):
            yield replace(record, repeat=repeat)
            continue
        features = extractor.features(record)
        running.add(features)
        if any(target.features is not None for target in targets):
            kept.append(features.astype(np.float32))
    statistics = running.statistics()
    values = {
        target.metric: _distance(target, statistics, kept, seed=config.seed + repeat)
        for target in targets
    }
    for metric, value in values.items():
        if not np.isfinite(value):
            raise NumericsError(f"{row.name}: {metric} is not finite ({value})")
    yield Measured(row.name, repeat, n, values)


def _images_of(row: Row, sample: SampleConfig) -> Iterator[MeasureProgress | np.ndarray]:
    """The images of a row in batches uint8 (B, H, W, C), with progress between."""
    if row.finished is not None:
        for start in range(0, sample.num, sample.batch_size):
            stop = min(start + sample.batch_size, sample.num)
            yield row.finished.batch(range(start, stop)).permute(0, 2, 3, 1).numpy()
            yield MeasureProgress(row.name, 0, stop, sample.num)
        return
    for record in sample_images(row.experts, sample):
        if isinstance(record, ImageBatch):
            yield record.images
        else:
            done = record.done * sample.num // record.total
            yield MeasureProgress(row.name, 0, done, sample.num)


def _distance(
    target: Target, statistics: Statistics, kept: Sequence[np.ndarray], *, seed: int
) -> float:
    if target.statistics is not None:
        reference = target.statistics
        return frechet_distance(statistics.mu, statistics.sigma, reference.mu, reference.sigma)
    return kernel_distance(np.concatenate(kept), target.features, seed=seed)
