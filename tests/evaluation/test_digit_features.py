"""The digit feature network: its interface, what it tells apart, the scripts that go with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from deme_cli.data.digits import load_digits
from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.frechet import RunningStatistics, frechet_distance

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def distance(images: np.ndarray) -> float:
    """The distance of images to the test split."""
    extractor, ends = load_extractor("digits"), []
    for one in (images, load_digits("test")[0]):
        running = RunningStatistics()
        running.add(extractor.features(one))
        ends += [running.statistics().mu, running.statistics().sigma]
    return frechet_distance(*ends)


def test_blurred_and_noisy_digits_are_farther_from_the_test_split_than_real_ones() -> None:
    real = load_digits("train")[0].astype(np.float64)
    noise = np.random.default_rng(0).standard_normal(real.shape)
    blurred = 0.8 * real + 0.2 * np.roll(real, 1, axis=1)
    degraded = [real + 24 * noise, blurred, 0.7 * real, np.roll(real, 2, axis=2)]
    nearest = min(distance(i.round().clip(0, 255).astype(np.uint8)) for i in degraded)
    assert 1.2 * distance(real.astype(np.uint8)) < nearest
    images, labels = load_digits("all")
    assert distance(images[np.array(labels) != 8]) > 2 * distance(images), "eights are missed"


def test_the_script_that_makes_it_writes_a_network_of_the_shipped_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = example("digit_features.py")
    images = torch.zeros(200, 3, 8, 8)
    images[:, :, 4, 4] = 255
    moved = script.augment(images, torch.Generator().manual_seed(0))
    places = {divmod(int(index), 8) for index in moved[:, 0].flatten(1).argmax(1)}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    monkeypatch.setattr(script, "STEPS", 4)
    script.main(tmp_path / "features.pt")
    assert "test 0." in capsys.readouterr().out
    extractor = load_extractor(str(tmp_path / "features.pt"))
    assert extractor.num_features((1, 8, 8)) == load_extractor("digits").num_features((1, 8, 8))


def test_the_classifier_of_the_example_tells_the_test_digits() -> None:
    images, labels = load_digits("test")
    recognised = example("digits_text/accuracy.py").recognised
    assert recognised(images, np.array(labels)).mean() > 0.99
    assert recognised(images, (np.array(labels) + 1) % 10).mean() < 0.01
