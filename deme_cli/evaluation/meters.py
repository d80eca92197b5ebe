"""Meters: each looks at the images of one row and repeat, batch by batch, and tells its scores.

Distances to references, the CLIP score of images and prompts, the accuracy of a classifier. Looking
at images costs the time and depends on them alone, so several processes do it; what comes out, a
row of numbers per image, is taken in by one of them, in the order of the images.
B batch, d features.
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
    def look(self, images: np.ndarray, first: int) -> np.ndarray:
        """What there is to know of images first .. first + B - 1, uint8 (B, H, W, C): (B, ...)."""
        ...

    def take(self, rows: np.ndarray) -> None:
        """Take in what was seen of the next images."""
        ...

    def scores(self) -> dict[str, Score]:
        """By metric, once all images have been taken in."""
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

    def look(self, images: np.ndarray, first: int) -> np.ndarray:
        """Features (B, d) float64."""
        return self._extractor.features(images)

    def take(self, rows: np.ndarray) -> None:
        self._running.add(rows)
        if self._kept is not None:
            self._kept.append(rows.astype(np.float32))

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

    def look(self, images: np.ndarray, first: int) -> np.ndarray:
        """Cosines, and whether the prompt was truncated (1 or 0): (B, 2) float64."""
        pairs = self._scorer.compare(images, self._prompts[first : first + len(images)])
        return np.stack([pairs.cosines, pairs.truncated], axis=1)

    def take(self, rows: np.ndarray) -> None:
        self._cosines.append(rows[:, 0])
        self._num_truncated += int(rows[:, 1].sum())

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

    def look(self, images: np.ndarray, first: int) -> np.ndarray:
        """Whether each image is taken for its class: bool (B,)."""
        return self._classifier.recognise(images, self._classes[first : first + len(images)])

    def take(self, rows: np.ndarray) -> None:
        self._num_right += int(rows.sum())
        self._num += len(rows)

    def scores(self) -> dict[str, Score]:
        share = self._num_right / self._num
        details = {
            "standard_error": 100 * standard_error(share, self._num),
            "model": self._classifier.weights.name,
            "sha256": self._classifier.weights.sha256,
        }
        return {"accuracy": Score(100 * share, details)}
