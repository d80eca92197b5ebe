"""Meters: each takes in the images of one row and repeat, batch by batch, and tells its scores.

Distances to references, the CLIP score of images and prompts, the accuracy of a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from deme_cli.evaluation.accuracy import Classifier, standard_error
from deme_cli.evaluation.clip_score import ClipScorer
from deme_cli.evaluation.features import Extractor
from deme_cli.evaluation.frechet import RunningStatistics, Statistics, frechet_distance
from deme_cli.evaluation.kid import kernel_distance
from deme_cli.evaluation.targets import Target


@dataclass(frozen=True)
class Score:
    """One metric of one row and repeat, and what else its document tells."""

    value: float
    details: dict[str, Any] = field(default_factory=dict)


class Meter(Protocol):
    def add(self, images: np.ndarray, first: int) -> None:
        """Take in images first .. first + B - 1, uint8 (B, H, W, C)."""
        ...

    def scores(self) -> dict[str, Score]:
        """By metric, once all images have been seen."""
        ...


@dataclass(frozen=True)
class Instruments:
    """All that measures images, loaded: features and what they are compared with, and the rest."""

    extractor: Extractor | None = None
    targets: Sequence[Target] = ()
    clip: ClipScorer | None = None
    classifier: Classifier | None = None

    def meters(
        self, prompts: Sequence[str] | None, classes: Sequence[int] | None, *, seed: int
    ) -> list[Meter]:
        """Empty meters for images of these prompts and classes, one of each per image.

        seed: of the random subsets of a kernel distance.
        """
        found: list[Meter] = []
        if self.extractor is not None:
            found.append(DistanceMeter(self.extractor, self.targets, seed=seed))
        if self.clip is not None:
            found.append(ClipMeter(self.clip, prompts or ()))
        if self.classifier is not None:
            found.append(AccuracyMeter(self.classifier, classes or ()))
        return found


class DistanceMeter:
    """The distance of the images' features to each target."""

    def __init__(self, extractor: Extractor, targets: Sequence[Target], *, seed: int) -> None:
        self._extractor, self._targets, self._seed = extractor, targets, seed
        self._running = RunningStatistics()
        self._kept: list[np.ndarray] | None = None
        if any(target.features is not None for target in targets):
            self._kept = []

    def add(self, images: np.ndarray, first: int) -> None:
        features = self._extractor.features(images)
        self._running.add(features)
        if self._kept is not None:
            self._kept.append(features.astype(np.float32))

    def scores(self) -> dict[str, Score]:
        statistics = self._running.statistics()
        return {
            target.metric: Score(self._distance(target, statistics)) for target in self._targets
        }

    def _distance(self, target: Target, found: Statistics) -> float:
        if (reference := target.statistics) is not None:
            return frechet_distance(found.mu, found.sigma, reference.mu, reference.sigma)
        assert self._kept is not None
        assert target.features is not None
        return kernel_distance(np.concatenate(self._kept), target.features, seed=self._seed)


class ClipMeter:
    """100 times the mean cosine of images and prompts; prompts: one per image."""

    def __init__(self, scorer: ClipScorer, prompts: Sequence[str]) -> None:
        self._scorer, self._prompts = scorer, prompts
        self._cosines: list[np.ndarray] = []
        self._num_truncated = 0

    def add(self, images: np.ndarray, first: int) -> None:
        pairs = self._scorer.compare(images, self._prompts[first : first + len(images)])
        self._cosines.append(pairs.cosines)
        self._num_truncated += int(pairs.truncated.sum())

    def scores(self) -> dict[str, Score]:
        weights = self._scorer.weights
        details = {
            "truncated": self._num_truncated,
            "model": weights.model,
            "weights": weights.name,
            "sha256": weights.sha256,
        }
        return {"clip_score": Score(100 * float(np.concatenate(self._cosines).mean()), details)}


class AccuracyMeter:
    """The share of images taken for their class, in per cent; classes: one per image."""

    def __init__(self, classifier: Classifier, classes: Sequence[int]) -> None:
        self._classifier, self._classes = classifier, classes
        self._num_right = self._num = 0

    def add(self, images: np.ndarray, first: int) -> None:
        right = self._classifier.recognise(images, self._classes[first : first + len(images)])
        self._num_right += int(right.sum())
        self._num += len(right)

    def scores(self) -> dict[str, Score]:
        share = self._num_right / self._num
        details = {
            "standard_error": 100 * standard_error(share, self._num),
            "model": self._classifier.weights.name,
            "sha256": self._classifier.weights.sha256,
        }
        return {"accuracy": Score(100 * share, details)}
