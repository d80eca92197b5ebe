"""Accuracy: the share of images that a classifier takes for the class they were drawn for.

`digits` is Fisher's linear discriminant on the digit features, fitted in closed form to the 1,438
training digits; it tells 99.2 % of the test digits. Anything else is a TorchScript file of float32
images (B, 3, H, W) in [0, 255] -> logits (B, K).
B batch, d features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from deme_cli.data.digits import load_digits
from deme_cli.diffusion.denoiser import choose_device
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.evaluation.networks import Network, load_script, run_network, to_input
from deme_cli.evaluation.weights import ClassifierWeights

_DIGIT_PIXELS = 8


@dataclass(frozen=True)
class Classifier:
    """A loaded classifier."""

    weights: ClassifierWeights
    network: Network
    device: torch.device
    batch_size: int = 128

    def recognise(self, images: np.ndarray, classes: Sequence[int]) -> np.ndarray:
        """Whether each image is taken for its class: bool (B,).  images: uint8 (B, H, W, C)

        Raises ArtifactError where the network gives no logits of all these classes, NumericsError
        where they are not finite.
        """
        found = [
            self._classify(images[start : start + self.batch_size], max(classes, default=0) + 1)
            for start in range(0, len(images), self.batch_size)
        ]
        return np.concatenate(found) == np.asarray(classes)

    def _classify(self, images: np.ndarray, num_classes: int) -> np.ndarray:
        x = to_input(images, self.device)
        logits = run_network(self.network, x, where=self.weights.path, option="--accuracy")
        if logits.ndim != 2 or logits.shape[1] < num_classes:
            shape = " x ".join(str(size) for size in logits.shape[1:]) or "one number"
            raise ArtifactError(
                f"{self.weights.path}: expected logits of at least {num_classes} classes for each "
                f"image, found {shape}"
            )
        if not torch.isfinite(logits).all():
            raise NumericsError(f"{self.weights.path}: logits that are not finite")
        return logits.argmax(dim=1).cpu().numpy()


def standard_error(share: float, n: int) -> float:
    """Of a share of n independent trials: sqrt(p (1 - p) / n)."""
    return (share * (1 - share) / n) ** 0.5


def open_classifier(
    weights: ClassifierWeights, *, device: str = "cpu", batch_size: int = 128
) -> Classifier:
    """The network behind weights that have been found."""
    place = choose_device(device)
    network: Network = load_script(weights.path, place)
    if weights.name == "digits":
        network = _digit_classifier(network, place)
    return Classifier(weights, network, place, batch_size)


def _digit_classifier(features: Network, device: torch.device) -> Network:
    """Logits (B, 10) of the digit features; images of other sizes come to 8x8 in grey."""
    images, labels = load_digits("train")
    x = to_input(images, device)
    with torch.inference_mode():
        discriminant = linear_discriminant(features(x).cpu(), torch.tensor(labels))
    return lambda images: discriminant(features(_to_digit_size(images)).cpu().double())


def _to_digit_size(images: Tensor) -> Tensor:
    """Grey by the mean of the channels, 8x8 by the mean of areas.  (B, 3, H, W) -> (B, 3, 8, 8)"""
    grey = images.mean(dim=1, keepdim=True)
    return functional.adaptive_avg_pool2d(grey, _DIGIT_PIXELS).expand(-1, 3, -1, -1)


def linear_discriminant(features: Tensor, labels: Tensor) -> nn.Linear:
    """Logits mu_k^T S^-1 x - mu_k^T S^-1 mu_k / 2 of classes with means mu_k and one covariance S.

    (Fisher 1936), for equally frequent classes.  features: (n, d)   labels: (n,) in 0..K-1
    """
    x = features.double()
    means = torch.stack([x[labels == k].mean(dim=0) for k in range(int(labels.max()) + 1)])
    centred = x - means[labels]
    covariance = centred.T @ centred / (len(x) - len(means))
    weight = torch.linalg.solve(covariance, means.T).T  # (K, d)
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(-(means * weight).sum(dim=1) / 2)
    return linear.requires_grad_(False)
