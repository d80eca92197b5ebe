"""Draws are even over timesteps and images; intervals of means are Student's over images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from deme_cli.analysis.draws import draws_in, estimate, part, spread_draws
from deme_cli.analysis.settings import LossConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.timesteps import split_uniform
from deme_cli.training.examples import PixelExamples


def test_draws_are_even_and_do_not_depend_on_the_batch_size(finished_run: Path) -> None:
    denoiser = load_denoiser(finished_run / "base.safetensors")
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape, split="held-out"))
    spans = split_uniform(8, 100)
    draws, other = (
        spread_draws(examples, denoiser.schedule, spans, LossConfig(num=6, batch_size=size))
        for size in (4, 7)
    )
    for span, times in zip(spans, draws.t.view(8, 6), strict=True):
        assert all(int(t) in span for t in times)
    assert len(set(draws.images.tolist())) == 48
    assert torch.equal(draws.t, other.t)
    chosen = torch.tensor([3, 40])
    assert torch.equal(draws.noise(chosen)[1:], other.noise(chosen[1:]))
    owned = draws_in(draws, split_uniform(2, 100))
    assert owned.tolist() == [[True] * 24 + [False] * 24, [False] * 24 + [True] * 24]
    last = part(draws, range(40, 48))
    assert torch.equal(last.t, draws.t[40:])
    assert torch.equal(last.noise(torch.tensor([1])), draws.noise(torch.tensor([41])))


def test_an_interval_is_students_and_counts_images_not_draws() -> None:
    values = np.random.default_rng(0).normal(1, 2, 40)
    own = estimate(values, np.arange(40))
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert own.mean - own.half == pytest.approx(low)
    assert own.mean + own.half == pytest.approx(high)
    twice = estimate(np.concatenate([values, values]), np.tile(np.arange(40), 2))
    assert twice.half == pytest.approx(own.half)
    assert np.isnan(estimate(values, np.zeros(40)).half)
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
