"""Precision, recall, density and coverage against their definitions, and their laws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.evaluation import neighbours
from deme_cli.evaluation.neighbours import NAMES, neighbour_metrics


def draw(n: int, shift: float, seed: int, d: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)) + shift


@pytest.mark.parametrize("k", [1, 3])
def test_the_figures_are_those_of_the_papers_definitions(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_ROWS", 16)  # several pieces, the last one not whole
    made, real = draw(50, 0.7, seed=0), draw(41, 0.0, seed=1)
    real_radii, made_radii = (np.sort(cdist(x, x), axis=1)[:, k] for x in (real, made))
    distances = cdist(real, made)
    in_real, in_made = distances <= real_radii[:, None], distances <= made_radii
    expected = (
        in_real.any(axis=0).mean(),
        in_made.any(axis=1).mean(),
        in_real.sum() / (k * len(made)),
        in_real.any(axis=1).mean(),
    )
    found = neighbour_metrics(made, real, k)
    assert tuple(found) == NAMES
    assert tuple(found.values()) == pytest.approx(expected, rel=1e-12)
    assert 0 < found["recall"] != found["precision"] < 1


def test_a_set_shares_all_with_itself_and_nothing_with_one_far_away() -> None:
    x = draw(40, 0.0, seed=2)
    same, far = neighbour_metrics(x, x, 3), neighbour_metrics(x + 100, x, 3)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert set(far.values()) == {0}


def test_one_image_made_again_and_again_is_precise_and_covers_little() -> None:
    real = draw(60, 0.0, seed=3)
    found = neighbour_metrics(np.repeat(real[:1], 60, axis=0), real, 3)
    assert found["precision"] == 1
    assert found["recall"] < 0.1 > found["coverage"]


def test_sets_without_neighbours_or_of_other_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 neighbours need more than 3"):
        neighbour_metrics(draw(3, 0, seed=0), draw(9, 0, seed=1), 3)
    with pytest.raises(ArtifactError, match="6 and 5 features"):
        neighbour_metrics(draw(9, 0, seed=0), draw(9, 0, seed=1, d=5), 3)
