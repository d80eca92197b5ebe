"""What gradients say together: pairs are counted once, and noise is taken out of norms."""

from __future__ import annotations

import numpy as np
import pytest

from deme_cli.analysis.gradients.agreement import (
    distance_cosines,
    mean_norm,
    noise_norm,
    numbers_of,
    pair_cosines,
    said_of,
)
from deme_cli.timesteps import TimestepRange, split_uniform
from deme_cli.training.affinity import Affinity

WHOLE = TimestepRange(0, 100)


def affinity_of(means: np.ndarray, noise: np.ndarray | None = None) -> Affinity:
    """Of mean gradients (n, d), measured with noise (2, n, d) in the means of two halves."""
    halves = means + (np.zeros((2, *means.shape)) if noise is None else noise)
    found, n = halves.mean(0), len(means)
    norms = np.linalg.norm(found, axis=1)
    unit = found / norms[:, None]
    first, second = halves / np.linalg.norm(halves, axis=2, keepdims=True)
    source = {"source": "tiny", "fingerprint": "0" * 64}
    return Affinity(
        buckets=split_uniform(n, 100), cosines=(unit @ unit.T).tolist(), norms=norms.tolist(),
        losses=[1.0] * n, reliability=(first * second).sum(1).tolist(), model=source, data=source,
        num=8, seed=0, parameters=means.shape[1], sketch_size=means.shape[1], standard_error=0.0,
        ranges=split_uniform(2, 100),
    )  # fmt: skip


def test_pairs_within_and_across_ranges_near_and_far() -> None:
    means = np.array([[1.0, 0], [1, 0], [0, 1], [-1, 0]])
    affinity = affinity_of(means)
    within, across = pair_cosines(affinity, affinity.ranges)
    assert sorted(within) == [0, 1]
    assert sorted(across) == [-1, -1, 0, 0]
    near, far = distance_cosines(affinity)
    assert near.tolist() == [1, 0, 0]
    assert sorted(far) == [-1, -1, 0]
    odd = affinity_of(np.eye(5) + np.diag([1.0] * 3, 2))
    assert [values.size for values in distance_cosines(odd)] == [4, 3]
    assert pair_cosines(affinity, [WHOLE])[1].size == 0
    numbers = numbers_of(affinity)
    assert (numbers["within"], numbers["across"], numbers["distant"]) == (0.5, -0.5, -2 / 3)


def test_the_norm_of_a_mean_is_that_of_the_vectors() -> None:
    means = np.random.default_rng(0).normal(size=(7, 40))
    affinity = affinity_of(means)
    shares = np.array([len(bucket) for bucket in affinity.buckets]) / 100
    assert mean_norm(affinity, WHOLE) == pytest.approx(np.linalg.norm(shares @ means))
    assert noise_norm(affinity, WHOLE) == pytest.approx(0, abs=1e-6)
    some = TimestepRange(0, affinity.buckets[2].stop)
    own = shares[:3] / shares[:3].sum()
    assert mean_norm(affinity, some) == pytest.approx(np.linalg.norm(own @ means[:3]))


def test_noise_is_taken_out_of_norms_and_told() -> None:
    random, d = np.random.default_rng(1), 4000
    means = random.normal(size=(6, d)) / np.sqrt(d)
    noise = random.normal(size=(2, 6, d)) * 1.5 / np.sqrt(d)
    affinity, clean = affinity_of(means, noise), affinity_of(means)
    assert max(clean.norms) < 1.1
    assert min(affinity.norms) > 1.3
    assert mean_norm(affinity, WHOLE) == pytest.approx(mean_norm(clean, WHOLE), rel=0.15)
    expected = 1.5 / np.sqrt(2) / np.sqrt(6)  # of the mean of two halves, and of six buckets
    assert noise_norm(affinity, WHOLE) == pytest.approx(expected, rel=0.1)
    alone = affinity_of(means * 1e-9, noise)
    assert mean_norm(alone, WHOLE) < noise_norm(alone, WHOLE)


def test_what_is_said_holds_quantiles_and_a_sentence() -> None:
    said = said_of(affinity_of(np.eye(4)))
    assert said["within_ranges"] == [0] * 7
    assert set(said["mean_norms"]) == {"0:100", "0:50", "50:100"}
    assert "2 ranges by gradient, 0:50, 50:100: 0.00 within" in said["reading"]
