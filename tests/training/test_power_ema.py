from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deme_cli.artifacts import load_tensors, read_record
from deme_cli.config import FinetuneConfig
from deme_cli.errors import ConfigError
from deme_cli.merging.power_ema import coefficients_for_length
from deme_cli.training.power_profile import beta, gamma_of
from deme_cli.training.setup import Run, variant_path
from deme_cli.training.train import train

EVERY = FinetuneConfig(
    steps=12, batch_size=4, lr=1e-3, checkpoint_every=100, held_out=0, projection="none",
    ema_decay=0.0, ema_lengths=[0.05, 0.1, 0.15], snapshot_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def iterates(digits_run: Callable[..., Run]) -> Run:
    """A finished run that wrote its very weights after every update, and three averages."""
    run = digits_run(EVERY)
    list(train(run))
    return run


def flat(path: Path) -> torch.Tensor:
    """All weights of an artifact in one float64 row."""
    tensors = load_tensors(path)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_gamma_is_that_of_the_paper_and_has_the_length_asked_for() -> None:
    for sigma_rel, gamma in [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)]:
        found = gamma_of(sigma_rel)
        assert found == pytest.approx(gamma, abs=0.005)
        length = ((found + 1) / (found + 3)) ** 0.5 / (found + 2)
        assert length == pytest.approx(sigma_rel, rel=1e-14)
    assert 0 < gamma_of(0.2886) < 0.01  # all but the plain mean
    for wrong in (0.0, 12**-0.5):
        with pytest.raises(ConfigError, match="above 0, below"):
            gamma_of(wrong)


def test_the_first_update_forgets_the_start_and_gamma_0_is_the_plain_mean() -> None:
    assert beta(1, 5.0) == 0
    assert beta(4, 0.0) == 0.75


def test_the_running_average_is_the_sum_of_the_iterates_under_its_profile(iterates: Run) -> None:
    steps = EVERY.steps
    theta = [flat(variant_path(iterates.output, step=step)) for step in range(1, steps)]
    theta.append(flat(iterates.output))
    for t in (1, 5, steps):
        for length in EVERY.ema_lengths:
            power = gamma_of(length) + 1
            masses = [(tau**power - (tau - 1) ** power) / t**power for tau in range(1, t + 1)]
            expected = sum(mass * weights for mass, weights in zip(masses, theta, strict=False))
            step = t if t < steps else None
            kept = flat(variant_path(iterates.output, step=step, length=length))
            assert (kept - expected).abs().max() < 1e-6  # float32 by float64


def test_a_length_that_was_not_saved_is_mixed_from_those_that_were(iterates: Run) -> None:
    files = [
        variant_path(iterates.output, step=step, length=length)
        for step in (2, 4, 6, 8, 10, None)
        for length in (0.05, 0.15)
    ]
    w = coefficients_for_length([read_record(path, "expert") for path in files], 0.1)
    base = iterates.denoiser.network.state_dict()
    theta = torch.cat([base[name].double().flatten() for name in sorted(base)])
    mixed = theta + sum(w_i * (flat(path) - theta) for w_i, path in zip(w, files, strict=True))
    kept = flat(variant_path(iterates.output, length=0.1))
    assert (mixed - kept).norm() < 0.005 * (kept - theta).norm()


def test_a_length_of_more_digits_has_a_name_of_its_own() -> None:
    names = [variant_path(Path("x.safetensors"), length=s).name for s in (0.05, 0.0501)]
    assert names == ["ema-0.050.safetensors", "ema-0.0501.safetensors"]
