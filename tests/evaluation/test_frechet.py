"""The Fréchet distance: closed forms, clean-fid as the oracle, singular covariances."""

from __future__ import annotations

import warnings
from unittest.mock import Mock, patch

import numpy as np
import pytest
import scipy.linalg
from threadpoolctl import threadpool_info

from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.evaluation import frechet
from deme_cli.evaluation.frechet import (
    TRIAL_SIZE,
    RunningStatistics,
    fitting_threads,
    frechet_distance,
    trace_of_root,
)


def draw_features(n: int, d: int, seed: int) -> np.ndarray:
    """Correlated features with a falling spectrum, as those of a network."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((d, d)) * np.exp(-np.arange(d) / (d / 4))
    return generator.standard_normal((n, d)) @ mixing.T + generator.standard_normal(d)


def gaussian(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    features = draw_features(n, d, seed)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def clean_fid_distance(*statistics: np.ndarray) -> float:
    """clean-fid's own figure; it asks scipy for `disp=False`, which scipy 1.18 no longer takes."""
    from cleanfid import fid

    linalg = Mock(sqrtm=lambda matrix, disp: (scipy.linalg.sqrtm(matrix), 0.0))
    with patch.object(fid, "linalg", linalg):
        return float(fid.frechet_distance(*statistics))


def test_gaussians_are_apart_by_the_closed_forms() -> None:
    """The squared shift; the scale; nothing from itself; and of constant features the shift."""
    mu, sigma = gaussian(100, 12, seed=0)
    shift = np.linspace(-1, 2, 12)
    assert frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx(shift @ shift, rel=1e-10)
    sigma, zero = np.diag([1.0, 4.0, 9.0]), np.zeros(3)
    expected = (1 - 2) ** 2 * np.trace(sigma)  # Tr(S) + Tr(4 S) - 2 Tr(2 S)
    assert frechet_distance(zero, sigma, zero, 4 * sigma) == pytest.approx(expected)
    mu, sigma = gaussian(500, 32, seed=1)
    # a difference of two traces: small eigenvalues are known up to rounding of the large ones
    tolerance = 1e-9 * np.trace(sigma)
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=tolerance)
    nothing = np.zeros((4, 4))
    assert frechet_distance(np.zeros(4), nothing, np.full(4, 3.0), nothing) == 36


@pytest.mark.parametrize("d", [5, 64])
def test_the_distance_equals_that_of_clean_fid(d: int) -> None:
    first, second = gaussian(4 * d, d, seed=2), gaussian(5 * d, d, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = clean_fid_distance(*first, *second)
    assert frechet_distance(*first, *second) == pytest.approx(expected, rel=1e-6)


def test_the_distance_is_symmetric_and_takes_float32() -> None:
    first, second = gaussian(90, 40, seed=4), gaussian(30, 40, seed=5)
    expected = frechet_distance(*first, *second)
    assert frechet_distance(*second, *first) == pytest.approx(expected, rel=1e-9)
    single = [part.astype(np.float32) for part in second]
    assert frechet_distance(*first, *single) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("n1", "n2"), [(20, 200), (200, 20), (20, 30), (64, 64)])
def test_singular_covariances_give_the_sum_of_singular_values(n1: int, n2: int) -> None:
    d = 64
    x, y = draw_features(n1, d, seed=6), draw_features(n2, d, seed=7)
    root1 = (x - x.mean(axis=0)) / np.sqrt(n1 - 1)  # S = root^T root
    root2 = (y - y.mean(axis=0)) / np.sqrt(n2 - 1)
    expected = np.linalg.svd(root1 @ root2.T, compute_uv=False).sum()
    found = trace_of_root(np.cov(x, rowvar=False), np.cov(y, rowvar=False))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "is_singular"),
    [
        ([1, 1, 1], [0.5, 1, 2], False),
        ([1e-20] * 3, [0.5, 1, 2], False),  # full rank is a matter of proportion
        ([1, 1, 1], [0, 1, 2], True),
        ([1, 1, 1], [0, 0, 2], True),
        ([1, 1e-17, 1], [1, 1, 1], True),
    ],
)
def test_the_way_for_lower_ranks_is_taken_where_an_eigenvalue_is_not_positive(
    first: list[float], second: list[float], is_singular: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is slower; the other one would take the root of rounding noise."""
    singular = Mock(side_effect=frechet._eigenvalues_singular)
    monkeypatch.setattr(frechet, "_eigenvalues_singular", singular)
    found = trace_of_root(np.diag(first), np.diag(second))
    assert found == pytest.approx(np.sqrt(np.multiply(first, second)).sum(), rel=1e-8)
    assert singular.called is is_singular


def test_what_has_no_distance_is_refused() -> None:
    for mu, sigma, kind, words in (
        ([np.nan] * 2, np.eye(2), NumericsError, "not finite"),
        ([0, 0], [[0, 1], [1, 0]], NumericsError, "positive semi-definite"),
        ([0, 0], [[1, 0], [0, -0.5]], NumericsError, "positive semi-definite"),
        ([0] * 4, np.eye(4), ArtifactError, "2 and of 4 features"),
        ([0, 0], np.eye(4), ArtifactError, "cannot be compared"),
    ):
        with pytest.raises(kind, match=words):
            frechet_distance(np.zeros(2), np.eye(2), np.array(mu), np.array(sigma))


@pytest.mark.parametrize("sizes", [[1] * 100, [3, 50, 47]])
def test_running_statistics_equal_those_of_all_features_at_once(sizes: list[int]) -> None:
    features = draw_features(100, 7, seed=11) + 1e4  # far from zero, where sums would cancel
    running = RunningStatistics()
    for part in np.split(features, np.cumsum(sizes)[:-1]):
        running.add(part)
    found = running.statistics()
    assert found.n == 100
    np.testing.assert_allclose(found.mu, features.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.sigma, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-12)


def test_features_of_one_image_or_not_finite_are_refused() -> None:
    running = RunningStatistics()
    running.add(np.ones((1, 3)))
    with pytest.raises(ConfigError, match="base: a covariance needs at least 2 images"):
        running.statistics("base")
    with pytest.raises(NumericsError, match="not finite"):
        running.add(np.array([[1.0, np.inf, 0]]))
    running.add(np.full((1, 3), 3.0))  # of two there is one
    np.testing.assert_allclose(running.statistics().sigma, np.full((3, 3), 2.0))


def blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.mark.parametrize("size", [TRIAL_SIZE, 4 * TRIAL_SIZE])
def test_problems_take_one_thread_or_all_and_give_the_others_back(size: int) -> None:
    before, one = blas_threads(), [1] * len(blas_threads())
    with fitting_threads(size):
        assert blas_threads() in ([one] if size == TRIAL_SIZE else [one, before])
    assert blas_threads() == before
