"""Measuring one row in one repeat: its images pass through every meter.

The seed moves every row together far more than rows differ, so in one repeat all rows start from
the same noise, and rows are compared by paired differences to the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import NumericsError
from deme_cli.evaluation.meters import Instruments
from deme_cli.evaluation.rows import Row
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
    """The scores of one row in one repeat, by metric, on n images; `details` likewise."""

    row: str
    repeat: int
    n: int
    values: dict[str, float]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

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
    instruments: Instruments,
    *,
    sample: SampleConfig,
    config: EvalConfig,
) -> Iterator[MeasureProgress | Measured]:
    """Draw the images of a repeat (its seed is config.seed + repeat) and take their scores.

    Yields progress, then the one Measured. Raises NumericsError on images, features or scores
    that are not finite.
    """
    n = num_images(row, config)
    seed = config.seed + repeat
    meters, first = instruments.meters(row.prompts, row.classes, seed=seed), 0
    for record in _images_of(row, replace(sample, num=n, seed=seed)):
        if isinstance(record, MeasureProgress):
            yield replace(record, repeat=repeat)
            continue
        for meter in meters:
            meter.add(record, first)
        first += len(record)
    scores = {metric: score for meter in meters for metric, score in meter.scores().items()}
    for metric, score in scores.items():
        if not np.isfinite(score.value):
            raise NumericsError(f"{row.name}: {metric} is not finite ({score.value})")
    yield Measured(
        row.name,
        repeat,
        n,
        {metric: score.value for metric, score in scores.items()},
        {metric: score.details for metric, score in scores.items() if score.details},
    )


def _images_of(row: Row, sample: SampleConfig) -> Iterator[MeasureProgress | np.ndarray]:
    """The images of a row in batches uint8 (B, H, W, C), with progress between."""
    if row.finished is not None:
        for start in range(0, sample.num, sample.batch_size):
            stop = min(start + sample.batch_size, sample.num)
            yield row.finished.batch(range(start, stop)).permute(0, 2, 3, 1).numpy()
            yield MeasureProgress(row.name, 0, stop, sample.num)
        return
    for record in sample_images(row.experts, sample, scene=row.scene):
        if isinstance(record, ImageBatch):
            yield record.images
        else:
            done = record.done * sample.num // record.total
            yield MeasureProgress(row.name, 0, done, sample.num)
