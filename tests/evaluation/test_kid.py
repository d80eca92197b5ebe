"""The kernel distance against clean-fid's, and its laws."""

from __future__ import annotations

import numpy as np
import pytest

from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.evaluation.kid import NUM_SUBSETS, SUBSET_SIZE, kernel_distance


def draw(n: int, shift: float, seed: int, d: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)) + shift


def test_the_kernel_distance_of_whole_sets_equals_that_of_clean_fid() -> None:
    from cleanfid import fid

    x, y = draw(80, 0.0, seed=0), draw(80, 0.3, seed=1)
    expected = fid.kernel_distance(x, y, num_subsets=1, max_subset_size=1000)
    assert kernel_distance(x, y, num_subsets=1) == pytest.approx(expected, rel=1e-10)


def test_the_kernel_distance_of_subsets_agrees_with_clean_fid_within_its_spread() -> None:
    from cleanfid import fid

    x, y = draw(600, 0.0, seed=2), draw(500, 0.3, seed=3)
    np.random.seed(0)
    theirs = [fid.kernel_distance(x, y, 20, 100) for _ in range(20)]
    ours = kernel_distance(x, y, num_subsets=20, subset_size=100)
    assert abs(ours - np.mean(theirs)) < 4 * np.std(theirs)


def test_the_kernel_distance_of_one_distribution_is_near_zero_on_either_side() -> None:
    distances = [
        kernel_distance(draw(200, 0, seed=10 + i), draw(200, 0, seed=50 + i), num_subsets=1)
        for i in range(20)
    ]
    assert abs(np.mean(distances)) < 3 * np.std(distances) / np.sqrt(20)
    assert min(distances) < 0 < max(distances)


def test_the_same_seed_gives_the_same_kernel_distance() -> None:
    x, y = draw(300, 0, seed=4), draw(300, 0.2, seed=5)
    first = kernel_distance(x, y, num_subsets=5, subset_size=50, seed=7)
    assert first == kernel_distance(x, y, num_subsets=5, subset_size=50, seed=7)
    assert first != kernel_distance(x, y, num_subsets=5, subset_size=50, seed=8)
    assert (NUM_SUBSETS, SUBSET_SIZE) == (100, 1000)  # as in Binkowski et al.'s own code
    pair = draw(2, 0, seed=0), draw(2, 0.3, seed=1)
    assert kernel_distance(*pair) == kernel_distance(*pair, num_subsets=100, seed=0)


def test_what_has_no_kernel_distance_is_refused() -> None:
    for features, kind, words in (
        (draw(1, 0, seed=0), ConfigError, "2 images or more"),
        (draw(9, 0, seed=0, d=8), ArtifactError, "8 and 16 features"),
        (draw(9, np.nan, seed=0), NumericsError, "not finite"),
    ):
        with pytest.raises(kind, match=words):
            kernel_distance(features, draw(9, 0, seed=0))
