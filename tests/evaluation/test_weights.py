"""Which feature network is meant, and what its distances may be called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deme_cli.artifacts import StatisticsRecord, write_artifact
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.weights import (
    DIGITS_PATH,
    choose_features,
    find_weights,
    require_same_extractor,
)


def statistics_record(**changes: object) -> StatisticsRecord:
    found = find_weights("digits")
    values = {"n": 2, "extractor": found.extractor, "resize": found.resize, "source": "x"}
    return StatisticsRecord(**{**values, **changes})


def test_only_inception_features_give_a_distance_called_fid(stand_in: Path) -> None:
    assert find_weights("inception", weights=stand_in).metric_name == "fid"
    assert find_weights("inception", weights=stand_in).kernel_name == "kid"
    assert find_weights("digits").metric_name == "frechet_digits"
    assert find_weights(str(stand_in)).metric_name == "frechet_stand_in"
    assert find_weights(str(stand_in)).kernel_name == "kernel_stand_in"


def test_a_file_called_inception_is_still_no_inception(stand_in: Path) -> None:
    path = stand_in.rename(stand_in.with_name("inception.pt"))
    assert find_weights(str(path)).metric_name == "frechet_inception"


def test_weights_of_another_checksum_are_known_as_such(cache: Path, stand_in: Path) -> None:
    given = find_weights("inception", weights=stand_in)
    assert given.published is False
    stand_in.rename(cache / "inception-2015-12-05.pt")
    found = find_weights("inception")
    assert found.sha256 == given.sha256
    assert found.path.parent == cache


def test_features_follow_the_reference_unless_they_are_given(tmp_path: Path) -> None:
    made = tmp_path / "ref.safetensors"
    write_artifact(made, {"mu": np.zeros(2)}, statistics_record())
    assert choose_features(None, ["digits"]) == "digits"
    assert choose_features(None, ["cifar10"]) == "inception"
    assert choose_features(None, [str(made)]) == "digits"
    assert choose_features("clip", ["digits"]) == "clip"


def test_statistics_of_another_network_or_resize_are_refused() -> None:
    weights = find_weights("digits")
    require_same_extractor(statistics_record(), weights, "ref")
    with pytest.raises(ArtifactError, match="resize clean"):
        require_same_extractor(statistics_record(resize="clean"), weights, "ref")
    other = {"name": "digits", "sha256": "f" * 64}
    with pytest.raises(ArtifactError, match="sha256 ffffffffffff"):
        require_same_extractor(statistics_record(extractor=other), weights, "ref")


def test_settings_that_contradict_each_other_are_refused(stand_in: Path) -> None:
    with pytest.raises(ConfigError, match="--weights goes with"):
        find_weights("digits", weights=stand_in)
    with pytest.raises(ConfigError, match="--resize legacy_pytorch goes with"):
        find_weights("digits", "legacy_pytorch")


def test_missing_weights_are_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"ViT-B-32\.pt"):
        find_weights("clip")
    with pytest.raises(MissingError, match=r"nowhere\.pt"):
        find_weights("inception", weights=tmp_path / "nowhere.pt")
    with pytest.raises(MissingError, match="expected inception, clip, digits"):
        find_weights("incepton")


def test_the_digit_features_ship_with_the_package() -> None:
    assert find_weights("digits").path == DIGITS_PATH
    assert DIGITS_PATH.stat().st_size < 300_000
