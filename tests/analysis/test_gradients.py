"""Mean gradients per bucket of timesteps: those of autograd, and what they say together."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from deme_cli.analysis import gradients as module
from deme_cli.analysis.draws import part, spread_draws
from deme_cli.analysis.gradients import (
    analyze_gradients,
    cosine_means,
    distance_cosines,
    mean_norm,
    noise_norm,
    pair_cosines,
)
from deme_cli.analysis.settings import GradientConfig
from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import DataConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.errors import NumericsError
from deme_cli.timesteps import TimestepRange, split_uniform
from deme_cli.training.clusters import Affinity, read_affinity
from deme_cli.training.examples import PixelExamples

CONFIG = GradientConfig(buckets=5, num=12, batch_size=4)
analyze = partial(
    analyze_gradients, settings=CONFIG, images=DataConfig(source="digits"), num_ranges=2
)
WHOLE = TimestepRange(0, 100)


def measured(path: Path) -> Affinity:
    return read_affinity(path, read_record(Path("base.safetensors")).fingerprint)


def full_gradient(bucket: TimestepRange, halves: slice = slice(None)) -> np.ndarray:
    """The gradient of the mean squared error over a bucket's draws, in one batch."""
    denoiser = load_denoiser(Path("base.safetensors"))
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape))
    draws = spread_draws(
        examples, denoiser.schedule, [bucket], 12, seed=0, purpose="gradients", batch_size=4
    )
    network, losses = denoiser.network.requires_grad_(True), []
    for half in [part(draws, range(6)), part(draws, range(6, 12))][halves]:
        assert all(int(t) in bucket for t in half.t)
        x0, _ = examples.draw(half.images.tolist(), flip=None, generator=None)
        eps = half.noise(torch.arange(6))
        output = predict(network, denoiser.schedule.add_noise(x0, eps, half.t), half.t)
        losses.append(functional.mse_loss(output, eps))
    found = torch.autograd.grad(sum(losses) / len(losses), list(network.parameters()))
    return torch.cat([one.flatten() for one in found]).double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_cosines_norms_and_reliability_are_those_of_whole_gradients(
    run_folder: Path, resumed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = analyze(output=Path("whole.json"))
    assert resumed(analyze, 3 * 12).document == made.document
    found, buckets = measured(made.path), split_uniform(5, 100)
    whole = [full_gradient(bucket) for bucket in buckets]
    assert np.allclose(found.cosines, [[cosine(a, b) for b in whole] for a in whole], atol=2e-5)
    assert found.norms == pytest.approx([np.linalg.norm(one) for one in whole], rel=1e-4)
    halves = [full_gradient(buckets[3], slice(i, i + 1)) for i in (0, 1)]
    assert found.reliability[3] == pytest.approx(cosine(*halves), abs=2e-5)
    assert found.parameters == len(whole[0]) == found.sketch_size
    assert (found.buckets, len(found.ranges), found.standard_error) == (buckets, 2, 0)
    other = analyze(settings=GradientConfig(buckets=5, num=12, batch_size=256), force=True)
    assert np.allclose(measured(other.path).cosines, found.cosines, atol=1e-5)
    monkeypatch.setattr(module, "SKETCH_SIZE", 2048)
    sketched = measured(analyze(force=True).path)
    assert sketched.standard_error == pytest.approx((2 / 2048) ** 0.5)
    error = np.abs(np.subtract(sketched.cosines, found.cosines)).max()
    assert 0 < error < 4 * sketched.standard_error


def test_a_gradient_that_is_not_finite_is_an_error(run_folder: Path) -> None:
    weights, record = load_tensors(Path("base.safetensors")), read_record(Path("base.safetensors"))
    weights = {name: 1e25 * theta for name, theta in weights.items()}
    write_artifact(Path("tiny.safetensors"), weights, record)
    with pytest.raises(NumericsError, match=r"tiny.*: the gradient of timesteps 0:20 is not"):
        analyze("tiny.safetensors")


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
    affinity = affinity_of(np.array([[1.0, 0], [1, 0], [0, 1], [-1, 0]]))
    within, across = pair_cosines(affinity, affinity.ranges)
    assert sorted(within) == [0, 1]
    assert sorted(across) == [-1, -1, 0, 0]
    near, far = distance_cosines(affinity)
    assert near.tolist() == [1, 0, 0]
    assert sorted(far) == [-1, -1, 0]
    odd = affinity_of(np.eye(5) + np.diag([1.0] * 3, 2))
    assert [values.size for values in distance_cosines(odd)] == [4, 3]
    assert pair_cosines(affinity, [WHOLE])[1].size == 0
    means = cosine_means(affinity)
    assert (means["within"], means["across"], means["distant"]) == (0.5, -0.5, -2 / 3)


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
