"""Intervals of a mean: Student's where each image is drawn once, wider where images are shared."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deme_cli.analysis.intervals import estimate


def test_an_interval_is_students_and_counts_images_not_draws() -> None:
    values = np.random.default_rng(0).normal(1, 2, 40)
    own = estimate(values, np.arange(40))
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert own.mean - own.half == pytest.approx(low)
    assert own.mean + own.half == pytest.approx(high)
    twice = estimate(np.concatenate([values, values]), np.tile(np.arange(40), 2))
    assert twice.half == pytest.approx(own.half)
    assert np.isnan(estimate(values, np.zeros(40)).half)
    assert estimate(values + 9, np.arange(40)).is_told_from_zero
    assert np.isnan(estimate(np.array([1.0, np.inf]), np.arange(2)).half)


def test_draws_that_share_an_image_tell_less_where_it_shifts_them_all() -> None:
    random, images = np.random.default_rng(1), np.repeat(np.arange(50), 8)
    covered = []
    for _ in range(300):
        values = random.normal(size=50)[images] + random.normal(size=400)
        own = estimate(values, images)
        covered.append(abs(own.mean) < own.half)
        assert own.half > 1.3 * estimate(values, np.arange(400)).half
    assert np.mean(covered) == pytest.approx(0.95, abs=0.04)
