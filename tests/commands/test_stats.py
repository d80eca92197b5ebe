"""`deme stats`: reference statistics as an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import Result

from deme_cli.artifacts import StatisticsRecord, read_record
from deme_cli.evaluation.features import load_extractor

Deme = Callable[..., Result]


def test_statistics_are_the_mean_and_covariance_of_the_features_of_squeezed_images(
    tmp_path: Path, deme: Deme
) -> None:
    """Of oblong ones, scaled without a crop."""
    folder, output = tmp_path / "oblong", tmp_path / "ref.safetensors"
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (6, 12, 20, 3), dtype=np.uint8)
    squeezed = []
    for index, each in enumerate(pixels):
        image = Image.fromarray(each)
        image.save(folder / f"{index}.png")
        squeezed.append(np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)))
    words = ("-o", output, "--features", "digits", "--size", 8, "--squeeze", "-b", 4)
    made = deme("stats", folder, *words)
    assert made.exception is None, made.exception
    assert made.stdout.strip() == str(output)
    extractor, arrays = load_extractor("digits"), load_file(output)
    features = extractor.features(np.stack(squeezed))
    assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    assert arrays["n"] == 6
    np.testing.assert_allclose(arrays["mu"], features.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(arrays["sigma"], np.cov(features, rowvar=False), atol=1e-6)
    record = read_record(output, "statistics")
    assert isinstance(record, StatisticsRecord)
    assert record.extractor == extractor.weights.extractor
    assert (record.data["split"], record.data["squeezed"]) == ("all", True)


def test_inception_statistics_carry_their_resize_mode(
    image_folder: Path, tmp_path: Path, stand_in: Path, deme: Deme
) -> None:
    output = tmp_path / "ref.safetensors"
    made = deme(
        "stats", image_folder, "-o", output, "--weights", stand_in, "--resize",
        "legacy_tensorflow", "--size", "12", "--json",
    )  # fmt: skip
    found = json.loads(made.stdout)
    assert (found["resize"], found["num_features"]) == ("legacy_tensorflow", 2048)
    assert found["data"]["shape"] == [3, 12, 12]


REFUSED = [
    (("digits", "-o", "ref.npz"), 2, "ends in .safetensors"),
    (("digits", "-o", "r.safetensors", "--size", "0"), 2, "--size 0"),
    (("digits", "-o", "r.safetensors", "--split", "dev"), 2, "split 'dev'"),
    (("nowhere", "-o", "r.safetensors"), 3, "nowhere"),
    (("cifar10", "-o", "r.safetensors"), 3, "cifar10"),
    (("digits", "-o", "r.safetensors", "--squeeze"), 2, "--size"),
    (("digits", "-o", "r.safetensors", "--features", "clip"), 3, "ViT-B-32.pt"),
    (("digits", "-o", "there.safetensors"), 2, "--force"),
]


def test_bad_input_is_one_clear_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, deme: Deme, refuse: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    there = ("stats", "digits", "-o", "there.safetensors", "--json")
    assert json.loads(deme(*there, "--split", "train").stdout)["n"] == 1438
    for arguments, exit_code, words in REFUSED:
        refuse(exit_code, words, "stats", *arguments)
    assert json.loads(deme(*there, "--force").stdout)["n"] == 359
