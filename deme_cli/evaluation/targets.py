"""What rows are compared with, ready for use: statistics, or the features of the reference images.

n images, d features.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from deme_cli.data.images import ImageData, open_images
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ArtifactError
from deme_cli.evaluation.features import Extractor, image_features
from deme_cli.evaluation.frechet import RunningStatistics, Statistics
from deme_cli.evaluation.references import Reference, find_reference
from deme_cli.evaluation.statistics import SetProgress
from deme_cli.fetch import sha256_of


@dataclass(frozen=True)
class Target:
    """A reference under the name of its metric.

    `statistics` for a Fréchet distance, or `features` (n, d) for a kernel distance. A process that
    has looked at reference images for another one has neither.
    """

    metric: str
    reference: Reference
    statistics: Statistics | None = None
    features: np.ndarray | None = None


def open_target(
    metric: str,
    reference: Reference,
    extractor: Extractor,
    shape: tuple[int, int, int],
    *,
    world: World = ALONE,
) -> Iterator[SetProgress | Target]:
    """The target of one metric; reference images come at `shape` (C, H, W), that of the rows.

    Yields progress over images, if there are any, then the Target. Processes of `world` share the
    images, and the first one alone has what they are for. Raises ArtifactError if statistics have
    another number of features.
    """
    num_features = extractor.num_features(shape)
    if statistics := read_statistics(reference):
        if len(statistics.mu) != num_features:
            raise ArtifactError(
                f"{reference.path}: statistics of {len(statistics.mu)} features, "
                f"{extractor.name} has {num_features}"
            )
        yield Target(metric, replace(reference, sha256=reference_digest(reference)), statistics)
        return
    data = open_reference_images(reference, shape)
    keep = metric == extractor.weights.kernel_name
    running, kept = RunningStatistics(), []
    for features in image_features(data, extractor, world):
        running.add(features)
        if keep:
            kept.append(features.astype(np.float32))
        yield SetProgress(running.n, len(data))
    counted = replace(reference, n=len(data), sha256=data.fingerprint)
    if not world.is_first:
        yield Target(metric, counted)
    elif keep:
        yield Target(metric, counted, features=np.concatenate(kept))
    else:
        yield Target(metric, counted, running.statistics())


def reference_statistics(
    source: str, extractor: Extractor, *, split: str | None = None, batch_size: int = 128
) -> Statistics:
    """Mean and covariance of a reference's features, at the size of its own images.

    split: `train` or `test` of images that have one; the default is the test split of the digits.
    """
    weights = extractor.weights
    reference = find_reference(source, weights.family, weights.resize, weights=weights, split=split)
    if statistics := read_statistics(reference):
        return statistics
    running = RunningStatistics()
    images, extractor = open_reference_images(reference), replace(extractor, batch_size=batch_size)
    for features in image_features(images, extractor):
        running.add(features)
    return running.statistics()


def open_reference_images(
    reference: Reference, shape: tuple[int, int, int] | None = None, *, squeeze: bool = False
) -> ImageData:
    """The images of a reference, cropped or squeezed to `shape` (C, H, W), or at their own size."""
    split = reference.split or "all"
    return open_images(reference.source, shape=shape, split=split, squeeze=squeeze)


def reference_digest(reference: Reference) -> str:
    """SHA-256 of the file that a reference is, or the fingerprint of its images."""
    if reference.path is not None:
        return sha256_of(reference.path)
    split = reference.split or "all"
    return open_images(reference.source, shape=(3, 8, 8), split=split, keep=False).fingerprint


def read_statistics(reference: Reference) -> Statistics | None:
    """The mean and covariance that a reference holds; None where it is images.

    Raises ArtifactError for arrays of shapes that do not fit each other.
    """
    if reference.path is None:
        return None
    if reference.kind == "statistics":
        arrays = load_file(reference.path)
        mu, sigma = arrays.get("mu"), arrays.get("sigma")
    else:
        mu, sigma = _load_npz(reference.path)
    if mu is None or sigma is None or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        shapes = [None if part is None else tuple(part.shape) for part in (mu, sigma)]
        raise ArtifactError(
            f"{reference.path}: expected mu (d,) and sigma (d, d), found {shapes[0]}, {shapes[1]}"
        )
    mu, sigma = (np.asarray(part, dtype=np.float64) for part in (mu, sigma))
    return Statistics(mu, sigma, reference.n or 0)


def _load_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["mu"], arrays["sigma"]
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}; fetch or make it again") from error
