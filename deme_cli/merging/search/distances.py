"""Objectives by sampling: the Fréchet or the kernel distance of generated images to real ones.

Image i depends on (seed, i) alone, so candidates share their noise, and what one rung of a ladder
has drawn of a candidate is the beginning of what the next one needs: features are kept on disk and
only the missing images are drawn. n images, d features.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deme_cli.config import SampleConfig
from deme_cli.errors import NumericsError
from deme_cli.evaluation.features import Extractor
from deme_cli.evaluation.frechet import RunningStatistics, Statistics, frechet_distance
from deme_cli.evaluation.kid import kernel_distance
from deme_cli.files import write_whole
from deme_cli.sampling.conditioning import Conditioning
from deme_cli.sampling.ensemble import SamplingExpert
from deme_cli.sampling.sampler import ImageBatch, StepProgress, sample_images
from deme_cli.training.held_out import Check


class FeatureStore:
    """Features of candidates' images, by a key, in a folder that goes when the search ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: str) -> np.ndarray | None:
        """What is kept: (m, d) float32. A file that is not whole counts as nothing."""
        try:
            return np.load(self.folder / f"{key}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None

    def save(self, key: str, features: np.ndarray) -> None:
        stream = io.BytesIO()
        np.save(stream, features, allow_pickle=False)
        write_whole(self.folder / f"{key}.npy", [stream.getvalue()])

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class GeneratedDistance:
    """Distance between features of `conditioning.num` generated images and of a reference.

    reference: statistics for a Fréchet distance, features (m, d) for a kernel distance.
    """

    def __init__(
        self, extractor: Extractor, reference: Statistics | np.ndarray, card: dict[str, Any],
        *, sample: SampleConfig, conditioning: Conditioning, store: FeatureStore | None = None,
    ) -> None:  # fmt: skip
        self._extractor, self._reference = extractor, reference
        self._sample, self._conditioning, self._store = sample, conditioning, store
        on_inception = extractor.metric_name == "fid"
        self.is_kernel = not isinstance(reference, Statistics)
        if not self.is_kernel:
            self.name = extractor.metric_name
            self.label = "FID" if on_inception else f"Fréchet distance on {extractor.name}"
        else:
            self.name = extractor.weights.kernel_name
            self.label = "KID" if on_inception else f"kernel distance on {extractor.name}"
        self.protocol: dict[str, Any] = {
            "name": self.name,
            "extractor": {"name": extractor.name, "sha256": extractor.sha256},
            **card,
            **{key: value for key, value in asdict(sample).items() if key != "batch_size"},
            **conditioning.card,
        }
        drawn = {k: v for k, v in self.protocol.items() if k not in ("name", "num", *card)}
        self._drawn = json.dumps(drawn, sort_keys=True, default=str)

    def __call__(self, experts: Sequence[SamplingExpert], check: Check, key: str = "") -> float:
        try:
            return self.distance(self.features(experts, check, key))
        except NumericsError:
            return float("nan")  # this candidate's images are not finite; the others may be

    def features(
        self, experts: Sequence[SamplingExpert], check: Check, key: str = ""
    ) -> np.ndarray:
        """Features of the images (n, d) float32, those kept under `key` not drawn again."""
        place = hashlib.sha256(f"{key}{self._drawn}".encode()).hexdigest()[:32]
        kept = self._store.load(place) if self._store and key else None
        num, parts = self._conditioning.num, []
        if kept is not None:
            parts.append(kept[:num])
        first = len(parts[0]) if parts else 0
        drawing = sample_images(
            experts, self._sample, conditioning=self._conditioning, hold_one=len(experts) > 1,
            first=first,
        )  # fmt: skip
        for record in drawing if first < num else ():
            if isinstance(record, ImageBatch):
                parts.append(self._extractor.features(record.images).astype(np.float32))
            elif isinstance(record, StepProgress):
                check(record.done * num // record.total, num)
        features = np.concatenate(parts)
        if not np.isfinite(features).all():
            raise NumericsError("the features are not finite; the images or the extractor are bad")
        if self._store and key and first < num:
            self._store.save(place, features)
        return features

    def distance(self, features: np.ndarray) -> float:
        """The distance of features (n, d) to the reference."""
        if isinstance(self._reference, Statistics):
            running = RunningStatistics()
            running.add(features)
            found = running.statistics()
            return frechet_distance(
                found.mu, found.sigma, self._reference.mu, self._reference.sigma
            )
        return kernel_distance(features, self._reference, seed=self._sample.seed)
