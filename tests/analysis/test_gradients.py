"""Mean gradients per bucket of timesteps: those of autograd, sketched, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from deme_cli.analysis.draws import part, spread_draws
from deme_cli.analysis.gradients import (
    analyze_gradients,
    cosine_means,
    cosines_of,
    pair_cosines,
    sketch,
)
from deme_cli.analysis.settings import GradientConfig
from deme_cli.artifacts import read_record
from deme_cli.config import DataConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.errors import NumericsError
from deme_cli.timesteps import TimestepRange, split_uniform
from deme_cli.training.clusters import Affinity, read_affinity
from deme_cli.training.examples import PixelExamples

CONFIG = GradientConfig(buckets=5, num=12, batch_size=4)
SIZES = {"a.weight": 900, "a.bias": 7, "b.weight": 1300, "c": 1}
TOTAL, SEEDS, SIZE = sum(SIZES.values()), 200, 128
analyze = partial(
    analyze_gradients, settings=CONFIG, images=DataConfig(source="digits"), num_ranges=2
)


def full_gradient(bucket: TimestepRange, halves: slice = slice(None)) -> np.ndarray:
    """The gradient of the mean squared error over a bucket's draws, in one batch."""
    denoiser = load_denoiser(Path("base.safetensors"))
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape))
    draws = spread_draws(examples, denoiser.schedule, [bucket], CONFIG)
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
    run_folder: Path, resumed: Any
) -> None:
    made = resumed(analyze, 3 * 12)
    found = read_affinity(made.path, read_record(Path("base.safetensors")).fingerprint)
    buckets = split_uniform(5, 100)
    whole = [full_gradient(bucket) for bucket in buckets]
    assert np.allclose(found.cosines, [[cosine(a, b) for b in whole] for a in whole], atol=2e-5)
    assert found.norms == pytest.approx([np.linalg.norm(one) for one in whole], rel=1e-4)
    halves = [full_gradient(buckets[3], slice(i, i + 1)) for i in (0, 1)]
    assert found.reliability[3] == pytest.approx(cosine(*halves), abs=2e-5)
    assert found.parameters == len(whole[0]) == found.sketch_size
    assert (found.buckets, len(found.ranges), found.standard_error) == (buckets, 2, 0)


def test_a_gradient_that_is_not_finite_is_an_error(
    run_folder: Path, write_changed: Callable[..., Path]
) -> None:
    path = write_changed("tiny.safetensors", "base.safetensors", 1e25)
    with pytest.raises(NumericsError, match=r"tiny.*: timesteps 0:20: the gradient is not finite"):
        analyze(path)


def test_pairs_within_and_across_ranges_near_and_far() -> None:
    source = {"source": "tiny", "fingerprint": "0" * 64}

    def of(means: np.ndarray) -> Affinity:
        n = len(means)
        return Affinity(
            buckets=split_uniform(n, 100), cosines=cosines_of(means).tolist(), norms=[1.0] * n,
            losses=[1.0] * n, reliability=[0.5] * n, model=source, data=source, num=8, seed=0,
            parameters=2, sketch_size=2, standard_error=0.0, ranges=split_uniform(2, 100),
        )  # fmt: skip

    affinity = of(np.array([[1.0, 0], [1, 0], [0, 1], [-1, 0]]))
    within, across = pair_cosines(affinity, affinity.ranges)
    assert sorted(within) == [0, 1]
    assert sorted(across) == [-1, -1, 0, 0]
    assert pair_cosines(affinity, [TimestepRange(0, 100)])[1].size == 0
    means = cosine_means(affinity)
    assert (means["within"], means["across"]) == (0.5, -0.5)
    assert (means["neighbouring"], means["distant"]) == (1 / 3, -2 / 3)
    odd = cosine_means(of(np.eye(5) + np.diag([1.0] * 3, 2)))
    assert odd["distant"] == 0, "from half of T on"


def vector(seed: int, *, heavy: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(count, generator=generator) for name, count in SIZES.items()}
    if heavy:
        made["b.weight"][:3] *= 40
    return made


def sketched(tensors: dict[str, torch.Tensor], *, seed: int = 0) -> np.ndarray:
    return sketch(tensors.items(), TOTAL, SIZE, seed=seed)


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat(list(tensors.values())).double().numpy()


@pytest.mark.parametrize(
    ("share", "heavy"), [(0.0, False), (0.7, False), (1.0, False), (0.7, True)]
)
def test_sketches_keep_inner_products_and_cosines_within_their_error(
    share: float, heavy: bool
) -> None:
    a, other = vector(1, heavy=heavy), vector(2, heavy=heavy)
    b = {name: share * a[name] + (1 - share) * other[name] for name in SIZES}
    exact, found, errors = flat(a) @ flat(b), [], []
    for seed in range(SEEDS):
        pair = np.array([sketched(one, seed=seed) for one in (a, b)])
        found.append(pair[0] @ pair[1])
        errors.append(cosines_of(pair)[0, 1] - cosine(flat(a), flat(b)))
    scale = np.linalg.norm(flat(a)) * np.linalg.norm(flat(b))
    bound = 2 * scale**2 / SIZE  # of the variance
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.sqrt(bound / SEEDS))
    assert np.var(found) < 1.3 * bound
    if not heavy:
        assert np.sqrt(np.mean(np.square(errors))) < np.sqrt(2 / SIZE)


def test_tensors_are_sketched_by_name_and_add_up_and_small_ones_are_kept() -> None:
    a = vector(1)
    whole = sketched(a)
    assert np.allclose(whole, sketched(dict(reversed(a.items()))))
    parts = [sketch([(name, one)], TOTAL, SIZE) for name, one in a.items()]
    assert np.allclose(whole, np.sum(parts, axis=0))
    assert not np.allclose(whole, sketched(a, seed=1))
    assert np.array_equal(sketch(a.items(), TOTAL, TOTAL), flat(a))
    assert not cosines_of(np.array([flat(a), 0 * flat(a)]))[1].any(), "nothing is like zero"
