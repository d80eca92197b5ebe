"""From images to features, through a loaded network, whatever it is.

B batch, C channels (1 or 3), H x W pixels, d features. Images come as uint8 (B, H, W, C); grey
ones are repeated to three channels. Features go out as float64 (B, d), computed in float32. On CUDA
devices no image passes Pillow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from deme_cli.data.images import ImageData
from deme_cli.diffusion.denoiser import choose_device
from deme_cli.distributed import ALONE, World
from deme_cli.evaluation.networks import (
    Network,
    load_clip,
    load_inception,
    load_script,
    run_network,
    to_input,
)
from deme_cli.evaluation.resizing import (
    BatchResizer,
    Resizer,
    clip_batch_resizer,
    clip_resizer,
    in_colour,
    inception_batch_resizer,
    inception_resizer,
    resize_all,
)
from deme_cli.evaluation.weights import FeatureWeights, find_weights
from deme_cli.sampling.shares import Shares


@dataclass(frozen=True)
class Extractor:
    """A loaded feature network, and what brings images to its size: None where they go in as is.

    `resize_batch` works on the device and comes first.
    """

    weights: FeatureWeights
    network: Network
    resize_image: Resizer | None
    device: torch.device
    batch_size: int = 128
    resize_batch: BatchResizer | None = None

    @property
    def name(self) -> str:
        return self.weights.name

    @property
    def sha256(self) -> str:
        return self.weights.sha256

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
        if self.resize_batch is None and self.resize_image is not None:
            images = resize_all(in_colour(images), self.resize_image)
        x = to_input(images, self.device)
        if self.resize_batch is not None:
            x = self.resize_batch(x)
        features = run_network(self.network, x, where=self.weights.path, option="--features")
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
    resize_image = resize_batch = None
    if weights.family == "inception":
        network = load_inception(weights, place)
        resize_image = inception_resizer(weights.resize)
        resize_batch = inception_batch_resizer(weights.resize, place)
    elif weights.family == "clip":
        network = load_clip(weights.path, place)
        resize_image, resize_batch = clip_resizer(), clip_batch_resizer(place)
    else:
        network = load_script(weights.path, place)
    return Extractor(weights, network, resize_image, place, batch_size, resize_batch)


def image_features(
    data: ImageData, extractor: Extractor, world: World = ALONE
) -> Iterator[np.ndarray]:
    """The features of all images of a set, in its order, batch by batch: float64 (B, d).

    Processes of `world` share the batches; the first one gets all features, the others none.
    Raises ConfigError where they have other images.
    """
    source = data.source
    world.require_same(
        {f"images in {source}": len(data), f"fingerprint of {source}": data.fingerprint[:12]}
    )
    shares = Shares(len(data), extractor.batch_size, world=world)
    for span in shares.rounds(shares.own):
        features = None
        if span is not None:
            features = extractor.features(data.batch(span).permute(0, 2, 3, 1).numpy())
        yield from shares.gather(features)
