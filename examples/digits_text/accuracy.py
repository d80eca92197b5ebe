"""How many prompted digits a classifier takes for what they were to show.

    python accuracy.py SAMPLES...

SAMPLES are artifacts of `deme sample`, which hold the class of each image. The classifier is
Fisher's linear discriminant on the digit features, fitted in closed form to the 1,438 training
digits; it tells 99.2 % of the test digits.
n images, d features, K classes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from deme_cli.artifacts import load_tensors, read_record
from deme_cli.data.digits import load_digits
from deme_cli.evaluation.features import load_extractor


def linear_discriminant(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K, d) and bias (K,) of mu_k^T S^-1 x - mu_k^T S^-1 mu_k / 2 (Fisher 1936).

    Classes have means mu_k and one covariance S, and are equally frequent.
    features: (n, d)   labels: (n,) in 0..K-1
    """
    means = np.stack([features[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
    centred = features - means[labels]
    covariance = centred.T @ centred / (len(features) - len(means))
    weight = np.linalg.solve(covariance, means.T).T
    return weight, -(means * weight).sum(axis=1) / 2


def recognised(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Whether each image is taken for its class: bool (n,).  images: uint8 (n, 8, 8, C)"""
    extractor = load_extractor("digits")
    digits, labels = load_digits("train")
    weight, bias = linear_discriminant(extractor.features(digits), np.array(labels))
    return (extractor.features(images) @ weight.T + bias).argmax(axis=1) == classes


def main(paths: list[Path]) -> None:
    for path in paths:
        images = load_tensors(path)["images"].numpy()
        right = recognised(images, np.array(read_record(path, "samples").classes))
        share, n = right.mean(), len(right)
        error = (share * (1 - share) / n) ** 0.5  # of a share of n independent trials
        print(f"{path.stem}: {100 * share:.1f} % recognised (s.e. {100 * error:.1f}, n {n})")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
