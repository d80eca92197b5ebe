"""From images to features, through a loaded network, whatever it is.

B batch, C channels (1 or 3), H x W pixels, d features. Images come as uint8 (B, H, W, C), grey ones
are repeated to three channels; features go out as float64 (B, d), computed in float32.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from deme_cli.data.images import ImageData
from deme_cli.diffusion.denoiser import choose_device
from deme_cli.evaluation.networks import (
    Network,
    Resizer,
    clip_resizer,
    in_colour,
    inception_resizer,
    load_clip,
    load_inception,
    load_script,
    run_network,
)
from deme_cli.evaluation.weights import FeatureWeights, find_weights


@dataclass(frozen=True)
class Extractor:
    """A loaded feature network. `resize_image` is None where images go in at their own size."""

    weights: FeatureWeights
    network: Network
    resize_image: Resizer | None
    device: torch.device
    batch_size: int = 128

    @property
    def name(self) -> str:
        return self.weights.name

    @property
    def sha256(self) -> str:
        return self.weights.sha256

    @property
    def resize(self) -> str:
        return self.weights.resize

    @property
    def metric_name(self) -> str:
        return self.weights.metric_name

    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C) -> float64 (B, d).

        Raises ArtifactError where the network does not take images of this size.
        """
        parts = [
            self._forward(images[start : start + self.batch_size])
            for start in range(0, len(images), self.batch_size)
        ]
        return np.concatenate(parts)

    def num_features(self, shape: tuple[int, int, int]) -> int:
        """d for images of `shape` (C, H, W), found by trying a black one."""
        channels, height, width = shape
        return self.features(np.zeros((1, height, width, channels), np.uint8)).shape[1]

    def _forward(self, images: np.ndarray) -> np.ndarray:
        if self.resize_image is not None:
            images = resize_all(in_colour(images), self.resize_image)
        features = run_network(
            self.network, images, self.device, where=self.weights.path, option="--features"
        )
        return features.flatten(1).cpu().double().numpy()


def load_extractor(
    name: str, *, resize: str = "clean", weights: Path | None = None, device: str = "cpu"
) -> Extractor:
    """The feature network called inception, clip or digits, or in the TorchScript file `name`.

    Raises what `find_weights` raises, and ArtifactError for a file that holds no such network.
    """
    return open_extractor(find_weights(name, resize, weights), device=device)


def open_extractor(
    weights: FeatureWeights, *, device: str = "cpu", batch_size: int = 128
) -> Extractor:
    """The network behind weights that have been found."""
    place = choose_device(device)
    resize_image = None
    if weights.family == "inception":
        network = load_inception(weights, place)
        resize_image = inception_resizer(weights.resize)
    elif weights.family == "clip":
        network, resize_image = load_clip(weights.path, place), clip_resizer()
    else:
        network = load_script(weights.path, place)
    return Extractor(weights, network, resize_image, place, batch_size)


def image_features(data: ImageData, extractor: Extractor) -> Iterator[np.ndarray]:
    """The features of all images of a set, in its order, batch by batch: float64 (B, d)."""
    for start in range(0, len(data), extractor.batch_size):
        indices = range(start, min(start + extractor.batch_size, len(data)))
        yield extractor.features(data.batch(indices).permute(0, 2, 3, 1).numpy())


def resize_all(images: np.ndarray, resize_image: Resizer) -> np.ndarray:
    """Each image through the resizer, in threads (Pillow and torch let go of the lock)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pillow's Image.fromarray(mode=)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(resize_image, images)))
