"""What rows are compared with, ready for use: statistics, or the features of the reference images.

n images, d features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from deme_cli.errors import ArtifactError
from deme_cli.evaluation.features import Extractor, image_features
from deme_cli.evaluation.frechet import RunningStatistics, Statistics
from deme_cli.evaluation.references import Reference, open_reference_images, read_statistics


@dataclass(frozen=True)
class Target:
    """A reference under the name of its metric.

    `statistics` for a Fréchet distance, or `features` (n, d) for a kernel distance.
    """

    metric: str
    reference: Reference
    statistics: Statistics | None = None
    features: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class TargetProgress:
    """`done` of the `total` images of a reference are looked at."""

    done: int
    total: int


def open_target(
    metric: str, reference: Reference, extractor: Extractor, shape: tuple[int, int, int]
) -> Iterator[TargetProgress | Target]:
    """The target of one metric; reference images come at `shape` (C, H, W), that of the rows.

    Yields progress over images, if there are any, then the Target. Raises ArtifactError if
    statistics have another number of features.
    """
    num_features = extractor.num_features(shape)
    if statistics := read_statistics(reference):
        if len(statistics.mu) != num_features:
            raise ArtifactError(
                f"{reference.path}: statistics of {len(statistics.mu)} features, "
                f"{extractor.name} has {num_features}"
            )
        yield Target(metric, reference, statistics)
        return
    data = open_reference_images(reference, shape)
    keep = metric == extractor.weights.kernel_name
    running, kept, done = RunningStatistics(), [], 0
    for features in image_features(data, extractor):
        running.add(features)
        if keep:
            kept.append(features.astype(np.float32))
        done += len(features)
        yield TargetProgress(done, len(data))
    counted = replace(reference, n=len(data))
    if keep:
        yield Target(metric, counted, features=np.concatenate(kept))
    else:
        yield Target(metric, counted, running.statistics())
