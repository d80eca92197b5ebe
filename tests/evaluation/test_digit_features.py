"""The digit feature network: its interface, what it tells apart, the command that makes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deme_cli.data.digits import load_digits_images
from deme_cli.evaluation import digit_features
from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.frechet import RunningStatistics, frechet_distance


def distance(images: np.ndarray) -> float:
    """The distance of images to the test split."""
    extractor = load_extractor("digits")
    found, reference = RunningStatistics(), RunningStatistics()
    found.add(extractor.features(images))
    reference.add(extractor.features(load_digits_images("test")))
    first, second = found.statistics(), reference.statistics()
    return frechet_distance(first.mu, first.sigma, second.mu, second.sigma)


def test_blurred_and_noisy_digits_are_farther_from_the_test_split_than_real_ones() -> None:
    real = load_digits_images("train").astype(np.float64)
    noise = np.random.default_rng(0).standard_normal(real.shape)
    blurred = 0.8 * real + 0.2 * np.roll(real, 1, axis=1)
    degraded = [real + 24 * noise, blurred, 0.7 * real, np.roll(real, 2, axis=2)]
    nearest = min(distance(i.round().clip(0, 255).astype(np.uint8)) for i in degraded)
    assert 1.2 * distance(real.astype(np.uint8)) < nearest


def test_missing_digits_are_noticed() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits_images("all"), load_digits().target
    assert distance(images[labels != 8]) > 2 * distance(images)


def test_the_labels_belong_to_the_images() -> None:
    images, labels = digit_features.load_labelled("test")
    assert images.shape == (359, 3, 8, 8)
    assert len(labels) == 359
    assert images.max() == 255


def test_augmentation_shifts_by_at_most_a_pixel() -> None:
    images = torch.zeros(200, 3, 8, 8)
    images[:, :, 4, 4] = 255
    moved = digit_features.augment(images, torch.Generator().manual_seed(0))
    places = {divmod(int(index), 8) for index in moved[:, 0].flatten(1).argmax(1)}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}


def test_the_command_writes_a_network_of_the_shipped_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digit_features, "STEPS", 4)
    digit_features.main(tmp_path / "features.pt")
    assert "test 0." in capsys.readouterr().out
    extractor = load_extractor(str(tmp_path / "features.pt"))
    assert extractor.num_features((1, 8, 8)) == load_extractor("digits").num_features((1, 8, 8))
