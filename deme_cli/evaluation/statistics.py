"""The procedure of `deme stats`: mean and covariance of the features of a set of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deme_cli.artifacts import StatisticsRecord
from deme_cli.data.images import ImageData
from deme_cli.distributed import ALONE, World
from deme_cli.evaluation.features import Extractor, image_features
from deme_cli.evaluation.frechet import RunningStatistics, Statistics


@dataclass(frozen=True, slots=True)
class SetProgress:
    """`done` of the `total` images of a set are looked at."""

    done: int
    total: int


def measure_statistics(
    data: ImageData, extractor: Extractor, world: World = ALONE
) -> Iterator[SetProgress | Statistics]:
    """Look at all images; yields progress, then the Statistics.

    Of the processes of `world`, which share the images, the first one alone yields anything.
    """
    running = RunningStatistics()
    for features in image_features(data, extractor, world):
        running.add(features)
        yield SetProgress(running.n, len(data))
    if world.is_first:
        yield running.statistics()


def statistics_artifact(
    statistics: Statistics, data: ImageData, extractor: Extractor, *, split: str
) -> tuple[dict[str, np.ndarray], StatisticsRecord]:
    """The tensors and the record of a `statistics` artifact."""
    tensors = {
        "mu": statistics.mu,
        "sigma": statistics.sigma,
        "n": np.array(statistics.n, dtype=np.int64),
    }
    record = StatisticsRecord(
        n=statistics.n,
        extractor=extractor.weights.extractor,
        resize=extractor.weights.resize,
        source=data.source,
        data={
            "fingerprint": data.fingerprint,
            "split": split,
            "shape": list(data.shape),
            "squeezed": data.squeeze,
        },
    )
    return tensors, record
