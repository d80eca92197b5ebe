"""What rows are compared with: every kind of reference, and what can be wrong with one."""

from __future__ import annotations

import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import write_statistics_npz

import deme_cli
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.console import Step
from deme_cli.data.digits import load_digits
from deme_cli.data.images import open_images
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.frechet import frechet_distance
from deme_cli.evaluation.references import (
    Reference,
    find_images,
    find_reference,
    find_weights,
    open_reference,
    reference_assets,
)
from deme_cli.evaluation.rows import open_rows, plan_rows

DIGITS = EvalConfig(features="digits")


def opened(source: str | Path | Reference, **options: object) -> Reference:
    found = source if isinstance(source, Reference) else find_reference(str(source), "digits")
    return open_reference(found, load_extractor("digits"), **options)


def test_the_reference_of_the_digits_is_their_test_split() -> None:
    expected = load_extractor("digits").features(load_digits("test")[0])
    statistics = opened("digits").statistics
    assert statistics.n == 359
    np.testing.assert_allclose(statistics.mu, expected.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(statistics.sigma, np.cov(expected, rowvar=False), atol=1e-6)


def test_published_statistics_are_read_from_the_cache_and_what_is_not_there_is_named(
    cache: Path,
) -> None:
    (asset,) = reference_assets("cifar10", "inception", "legacy_tensorflow")
    assert asset.name == "cifar10_legacy_tensorflow_train_32.npz"
    assert reference_assets("cifar10", "clip", "clean") == []
    write_statistics_npz(cache / "cifar10_clean_train_32.npz", num_features=5)
    reference = find_reference("cifar10", "inception")
    assert (reference.kind, reference.n) == ("published", 50_000)
    assert open_reference(reference, load_extractor("digits")).statistics.mu.shape == (5,)
    for source, words in (
        ("lsun-church", r"lsun_church_clean_train_256\.npz"),
        ("parti", r"prompts without images.*--clip-score"),
        ("coco", "deme stats FOLDER -o coco"),
        ("nowhere", "nowhere"),
        ("nowhere.npz", "no such file"),
    ):
        with pytest.raises(MissingError, match=words):
            find_reference(source, "inception")


def test_a_statistics_artifact_stands_for_its_images(tmp_path: Path, stand_in: Path) -> None:
    path = tmp_path / "ref.safetensors"
    assert deme_cli.reference_statistics("digits", path, split="train").n == 1438
    images = find_reference("digits", "digits", split="train")
    made, seen = (opened(one).statistics for one in (path, images))
    assert made.n == seen.n
    assert frechet_distance(made.mu, made.sigma, seen.mu, seen.sigma) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ArtifactError, match="made with digits"):
        find_reference(str(path), "file", weights=find_weights(str(stand_in)))
    with pytest.raises(ConfigError, match="--prc need images"):
        find_reference(str(path), "digits", needs_images=True)
    with pytest.raises(ConfigError, match="split 'dev'"):
        find_images("digits", "dev")


def test_an_npz_needs_mu_and_sigma_that_fit(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    for arrays, words in (
        ({"mean": np.zeros(3)}, "mu and sigma, or images as arr_0, found mean"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"found \(3,\), \(4, 4\)"),
        ({"mu": np.array([{}]), "sigma": np.eye(4)}, "cannot be read"),
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, "statistics of 7 features, digits has 64"),
        ({}, r"not a whole \.npz"),
    ):
        np.savez(path, **arrays) if arrays else path.write_bytes(b"no zip")
        with pytest.raises(ArtifactError, match=words):
            opened(path, shape=(1, 8, 8))


def test_of_a_reference_batch_of_adm_it_is_told_what_was_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch, alone, folder = (tmp_path / name for name in ("batch.npz", "alone.npz", "folder"))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    folder.mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(folder / f"{index}.png")
    both = {"mu": np.zeros(64), "sigma": np.eye(64)}
    np.savez(batch, arr_0=pixels, **both, mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez(alone, pixels)
    assert np.array_equal(opened(batch).statistics.sigma, np.eye(64))
    assert (
        ": mu and sigma taken, arr_0 left out; for those of its images: deme stats"
        in capsys.readouterr().err
    )
    found = find_reference(str(batch), "digits", needs_images=True)
    images = opened(found, needs_images=True)
    assert ": arr_0 taken, mu and sigma left out" in capsys.readouterr().err
    assert np.array_equal(images.features, opened(folder, needs_images=True).features)
    assert (find_reference(str(alone), "digits").kind, opened(alone).n) == ("images", 9)
    made = deme_cli.reference_statistics(str(batch), tmp_path / "s.safetensors", DIGITS)
    assert (made.n, made.data["shape"]) == (9, [1, 8, 8])
    (row,) = open_rows(plan_rows([str(alone)])[0], SampleConfig())
    assert (row.name, row.shape, len(row.finished)) == ("alone", (1, 8, 8), 9)


@pytest.mark.parametrize("name", ["edm2.pkl", "fidelity.pt"])
def test_the_command_told_for_pickled_statistics_makes_an_npz(tmp_path: Path, name: str) -> None:
    path, statistics = tmp_path / name, {"mu": np.zeros(64), "sigma": np.eye(64)}
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({"fid": statistics, "fd_dinov2": {}}))
    else:
        torch.save(statistics, path)
    with pytest.raises(ConfigError, match="a pickle") as told:
        find_reference(str(path), "digits")
    exec(shlex.split(str(told.value).split("if you trust it: ")[1])[2], {})
    assert np.array_equal(opened(path.with_suffix(".npz")).statistics.sigma, np.eye(64))


def test_reference_images_come_at_the_size_of_the_rows(image_folder: Path) -> None:
    told: list[Step] = []
    reference = opened(image_folder, shape=(1, 8, 8), progress=told.append)
    assert [(step.done, step.total) for step in told] == [(10, 10)]
    data = open_images(str(image_folder), shape=(3, 8, 8), split="all", keep=False)
    assert (reference.n, reference.sha256, reference.features) == (10, data.fingerprint, None)
    kernel = opened(image_folder, shape=(1, 8, 8), needs_images=True)
    assert (kernel.statistics, kernel.features.shape) == (None, (10, 64))
    with pytest.raises(ArtifactError, match="fails on 16x16"):
        opened(image_folder, shape=(1, 16, 16))
