"""Measuring one row in one repeat: its images pass through every meter.

Several processes share the batches: each draws its own and looks at them on its own device, and the
first one takes in what all have seen, in the order of the images. So the figures are those of one
process, bit for bit where the devices are alike.

The seed moves every row together far more than rows differ, so in one repeat all rows start from
the same noise, and rows are compared by paired differences to the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.distributed import ALONE, World
from deme_cli.errors import NumericsError
from deme_cli.evaluation.meters import Instruments, Meter
from deme_cli.evaluation.rows import Row
from deme_cli.sampling.compiled import UNCOMPILED, CompiledSteps
from deme_cli.sampling.sampler import ImageBatch, sample_images
from deme_cli.sampling.shares import Shares


@dataclass(frozen=True, slots=True)
class MeasureProgress:
    """`done` of the `total` images of this row and repeat are drawn and looked at.

    Of images of other processes, those are counted that have been taken in.
    """

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
    assert config.num is not None, "known once the prompts are"
    return config.num if row.finished is None else min(config.num, len(row.finished))


def measure_row(
    row: Row,
    repeat: int,
    instruments: Instruments,
    *,
    sample: SampleConfig,
    config: EvalConfig,
    world: World = ALONE,
    compiled: CompiledSteps = UNCOMPILED,
) -> Iterator[MeasureProgress | Measured]:
    """Draw the images of a repeat (its seed is config.seed + repeat) and take their scores.

    Yields progress, then, on the first process, the one Measured. Raises NumericsError on images,
    features or scores that are not finite, Lost where another process has ended.
    """
    n = num_images(row, config)
    seed = config.seed + repeat
    meters = instruments.meters(row.prompts, row.classes, seed=seed)
    shares = Shares(n, sample.batch_size, world=world)
    images = _images_of(row, replace(sample, num=n, seed=seed), shares, compiled)
    num_rounds = 0
    for seen in shares.rounds(images):
        if isinstance(seen, int):
            yield MeasureProgress(row.name, repeat, seen + shares.num_of_others(num_rounds), n)
            continue
        for meter in meters:
            for rows in shares.gather(meter.look(seen.images, seen.start) if seen else None):
                meter.take(rows)
        num_rounds += 1
    if world.is_first:
        yield _measured(row, repeat, n, meters)


def _measured(row: Row, repeat: int, n: int, meters: Sequence[Meter]) -> Measured:
    """The scores of meters that have taken in all images. Raises NumericsError."""
    scores = {metric: score for meter in meters for metric, score in meter.scores().items()}
    for metric, score in scores.items():
        if not np.isfinite(score.value):
            raise NumericsError(f"{row.name}: {metric} is not finite ({score.value})")
    return Measured(
        row.name,
        repeat,
        n,
        {metric: score.value for metric, score in scores.items()},
        {metric: score.details for metric, score in scores.items() if score.details},
    )


def _images_of(
    row: Row, sample: SampleConfig, shares: Shares, compiled: CompiledSteps
) -> Iterator[ImageBatch | int]:
    """The images of a row that this process sees, and between, how many of them are done."""
    if row.finished is not None:
        done = 0
        for span in shares.own:
            yield ImageBatch(span.start, row.finished.batch(span).permute(0, 2, 3, 1).numpy())
            done += len(span)
            yield done
        return
    for record in sample_images(
        row.experts, sample, conditioning=row.conditioning, world=shares.world, compiled=compiled
    ):
        if isinstance(record, ImageBatch):
            yield record
        else:
            yield record.done * shares.num // record.total
