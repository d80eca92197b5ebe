"""What rows are compared with: every kind of reference, and what can be wrong with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stand_ins import write_statistics_npz

from deme_cli.artifacts import write_artifact
from deme_cli.data.digits import load_digits_images
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.frechet import frechet_distance
from deme_cli.evaluation.references import find_images, find_reference, reference_assets
from deme_cli.evaluation.statistics import (
    SetProgress,
    measure_statistics,
    statistics_artifact,
)
from deme_cli.evaluation.targets import (
    Target,
    open_target,
    read_statistics,
    reference_digest,
    reference_statistics,
)
from deme_cli.evaluation.weights import find_weights


@pytest.fixture
def digits_statistics(tmp_path: Path) -> Path:
    """A statistics artifact of the digits' train split."""
    from deme_cli.data.images import open_images

    extractor, data = load_extractor("digits"), open_images("digits", shape=None, split="train")
    *_, statistics = measure_statistics(data, extractor)
    path = tmp_path / "ref.safetensors"
    write_artifact(path, *statistics_artifact(statistics, data, extractor, split="train"))
    return path


def test_the_reference_of_the_digits_is_their_test_split() -> None:
    extractor = load_extractor("digits")
    expected = extractor.features(load_digits_images("test"))
    found = reference_statistics("digits", extractor, batch_size=100)
    assert found.n == 359
    np.testing.assert_allclose(found.mu, expected.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.sigma, np.cov(expected, rowvar=False), atol=1e-6)
    assert reference_statistics("digits", extractor, split="train").n == 1438


def test_the_reference_of_cifar10_is_its_train_split() -> None:
    (asset,) = reference_assets("cifar10", "inception", "legacy_tensorflow")
    assert asset.name == "cifar10_legacy_tensorflow_train_32.npz"
    assert reference_assets("cifar10", "clip", "clean") == []


def test_published_statistics_are_read_from_the_cache(cache: Path) -> None:
    write_statistics_npz(cache / "cifar10_clean_train_32.npz", num_features=5)
    reference = find_reference("cifar10", "inception")
    assert (reference.kind, reference.n) == ("published", 50_000)
    statistics = read_statistics(reference)
    assert statistics is not None
    assert statistics.mu.shape == (5,)


def test_missing_published_statistics_are_named(cache: Path) -> None:
    with pytest.raises(MissingError, match=r"lsun_church_clean_train_256\.npz"):
        find_reference("lsun-church", "inception")


def test_prompts_without_images_are_no_reference() -> None:
    with pytest.raises(MissingError, match=r"prompts without images.*--clip-score"):
        find_reference("parti", "inception")


@pytest.mark.parametrize("name", ["lsun-bedroom", "coco", "imagenet"])
def test_where_no_statistics_are_published_deme_stats_is_named(name: str) -> None:
    with pytest.raises(MissingError, match=f"deme stats FOLDER -o {name}"):
        find_reference(name, "inception")


def test_a_statistics_artifact_stands_for_its_images(digits_statistics: Path) -> None:
    extractor = load_extractor("digits")
    made = reference_statistics(str(digits_statistics), extractor)
    seen = reference_statistics("digits", extractor, split="train")
    assert made.n == seen.n
    assert frechet_distance(made.mu, made.sigma, seen.mu, seen.sigma) == pytest.approx(0, abs=1e-9)


def test_statistics_of_other_features_are_refused(digits_statistics: Path, stand_in: Path) -> None:
    weights = find_weights(str(stand_in))
    with pytest.raises(ArtifactError, match="made with digits"):
        find_reference(str(digits_statistics), "file", weights=weights)


def test_an_npz_needs_mu_and_sigma_that_fit(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(ArtifactError, match="expected the arrays mu and sigma, found mean"):
        find_reference(str(path), "digits")
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ArtifactError, match=r"found \(3,\), \(4, 4\)"):
        read_statistics(find_reference(str(path), "digits"))
    np.savez(path, mu=np.array([{}]), sigma=np.eye(4))
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_statistics(find_reference(str(path), "digits"))
    path.write_bytes(b"no zip")
    with pytest.raises(ArtifactError, match=r"not a whole \.npz"):
        find_reference(str(path), "digits")
    with pytest.raises(MissingError, match="no such file"):
        find_reference(str(tmp_path / "nowhere.npz"), "digits")


def test_a_kernel_distance_needs_images(digits_statistics: Path) -> None:
    with pytest.raises(ConfigError, match="a kernel distance needs images"):
        find_reference(str(digits_statistics), "digits", kernel=True)


def test_a_reference_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nowhere"):
        find_reference(str(tmp_path / "nowhere"), "digits")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="split 'dev'"):
        find_images("digits", "dev")


def test_reference_images_come_at_the_size_of_the_rows(image_folder: Path) -> None:
    extractor = load_extractor("digits")
    reference = find_reference(str(image_folder), "digits")
    *progress, target = open_target("frechet_digits", reference, extractor, (1, 8, 8))
    assert progress == [SetProgress(10, 10)]
    assert isinstance(target, Target)
    assert target.reference.n == 10
    assert target.reference.sha256 == reference_digest(reference)
    assert target.features is None
    with pytest.raises(ArtifactError, match="fails on 16x16"):
        list(open_target("frechet_digits", reference, extractor, (1, 16, 16)))


def test_the_target_of_a_kernel_distance_keeps_features(image_folder: Path) -> None:
    reference = find_reference(str(image_folder), "digits", kernel=True)
    *_, target = open_target("kernel_digits", reference, load_extractor("digits"), (1, 8, 8))
    assert isinstance(target, Target)
    assert target.statistics is None
    assert target.features is not None
    assert target.features.shape == (10, 64)


def test_statistics_of_another_number_of_features_are_refused_at_once(tmp_path: Path) -> None:
    path = write_statistics_npz(tmp_path / "ref.npz", num_features=7)
    reference = find_reference(str(path), "digits")
    with pytest.raises(ArtifactError, match="statistics of 7 features, digits has 64"):
        list(open_target("frechet_digits", reference, load_extractor("digits"), (1, 8, 8)))
