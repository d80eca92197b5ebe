"""Accuracy: the digit classifier on real digits, and classifiers from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import save_script
from torch import Tensor, nn

from deme_cli.data.digits import load_digits
from deme_cli.errors import ArtifactError, MissingError, NumericsError
from deme_cli.evaluation.accuracy import (
    Classifier,
    linear_discriminant,
    open_classifier,
    standard_error,
)
from deme_cli.evaluation.meters import AccuracyMeter
from deme_cli.evaluation.weights import find_classifier


class Brightest(nn.Module):
    """Logits of three classes: which channel is the brightest."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3])


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3]) / 0


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[1, 2, 3])


def load_classifier(name: str) -> Classifier:
    return open_classifier(find_classifier(name))


def test_the_digit_classifier_tells_the_test_digits() -> None:
    images, labels = load_digits("test")
    meter = AccuracyMeter(load_classifier("digits"), labels)
    meter.take(meter.look(images[:200], 0))
    meter.take(meter.look(images[200:], 200))
    score = meter.scores()["accuracy"]
    assert score.value > 99
    assert score.details["model"] == "digits"
    share = score.value / 100
    assert score.details["standard_error"] == pytest.approx(
        100 * (share * (1 - share) / 359) ** 0.5
    )


def test_wrong_classes_are_not_recognised() -> None:
    images, labels = load_digits("test")
    wrong = [(label + 1) % 10 for label in labels]
    assert load_classifier("digits").recognise(images, wrong).mean() < 0.01


def test_larger_coloured_digits_are_taken_by_the_mean_of_areas() -> None:
    images, labels = load_digits("test")
    classifier = load_classifier("digits")
    large = images.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
    np.testing.assert_array_equal(
        classifier.recognise(large, labels), classifier.recognise(images, labels)
    )


def test_the_discriminant_is_the_bayes_rule_of_gaussians_with_one_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 6.0]], dtype=torch.float64)
    labels = torch.arange(3).repeat(4000)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    noise = torch.randn(len(labels), 2, generator=generator, dtype=torch.float64)
    logits = linear_discriminant(means[labels] + scale * noise, labels)(means / 2)
    # halfway between a mean and the origin two classes are equally likely
    assert (logits[1, 1] - logits[1, 0]).abs() < 0.2
    assert (logits[2, 2] - logits[2, 0]).abs() < 0.2


def test_any_torchscript_of_images_to_logits_will_do(tmp_path: Path) -> None:
    classifier = load_classifier(str(save_script(Brightest(), tmp_path / "brightest.pt")))
    images = np.zeros((3, 5, 7, 3), np.uint8)
    for index in range(3):
        images[index, ..., index] = 9
    assert classifier.recognise(images, [0, 1, 1]).tolist() == [True, True, False]
    assert classifier.weights.card["model"] == "brightest"


def test_the_standard_error_is_that_of_a_binomial_share() -> None:
    draws = np.random.default_rng(0).binomial(50, 0.8, 200_000) / 50
    assert standard_error(0.8, 50) == pytest.approx(draws.std(), rel=0.01)


def test_what_is_no_classifier_of_these_classes_is_refused(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    brightest = load_classifier(str(save_script(Brightest(), tmp_path / "brightest.pt")))
    with pytest.raises(ArtifactError, match="at least 8 classes for each image, found 3"):
        brightest.recognise(images, [0, 7])
    flat = load_classifier(str(save_script(Flat(), tmp_path / "flat.pt")))
    with pytest.raises(ArtifactError, match="found one number"):
        flat.recognise(images, [0, 1])
    broken = load_classifier(str(save_script(Broken(), tmp_path / "broken.pt")))
    with pytest.raises(NumericsError, match="not finite"):
        broken.recognise(images, [0, 1])
    (tmp_path / "text.pt").write_text("no script")
    with pytest.raises(ArtifactError, match="not a readable TorchScript"):
        load_classifier(str(tmp_path / "text.pt"))
    with pytest.raises(MissingError, match=r"--accuracy nowhere\.pt"):
        load_classifier("nowhere.pt")
