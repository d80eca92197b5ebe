from __future__ import annotations

import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER

from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.denoiser import build_network
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.timesteps import TimestepRange
from deme_cli.training.objective import draw_timesteps, expert_loss
from deme_cli.training.state import learning_rate

SPAN, T = TimestepRange(250, 500), 1000


def draw(num: int, **options) -> torch.Tensor:
    return draw_timesteps(num, SPAN, T, generator=torch.Generator().manual_seed(0), **options)


def in_range(t: torch.Tensor) -> float:
    return ((t >= SPAN.start) & (t < SPAN.stop)).float().mean().item()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_the_in_range_fraction_is_one_minus_p_plus_p_over_n(p: float) -> None:
    t = draw(40_000, p=p)
    expected = 1 - p + p / 4
    tolerance = 5 * (expected * (1 - expected) / len(t)) ** 0.5  # five standard errors
    assert abs(in_range(t) - expected) <= tolerance
    assert t.min() >= (SPAN.start if p == 0 else 0)
    assert t.max() < (SPAN.stop if p == 0 else T)


def test_every_timestep_of_the_range_is_drawn_equally_often() -> None:
    counts = torch.bincount(draw(100_000, p=0.0) - SPAN.start, minlength=len(SPAN)).float()
    assert len(counts) == len(SPAN)
    chi_squared = ((counts - 400) ** 2 / 400).sum().item()
    assert chi_squared < 250 + 5 * (2 * 250) ** 0.5


def test_per_batch_draws_decide_once_for_the_whole_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    inside = [
        in_range(draw_timesteps(64, SPAN, T, p=0.5, per_batch=True, generator=generator))
        for _ in range(200)
    ]
    assert 0.35 < sum(fraction == 1 for fraction in inside) / 200 < 0.65
    assert all(fraction == 1 or fraction < 0.7 for fraction in inside)


@pytest.mark.parametrize("num", [8, 9])
def test_antithetic_draws_come_in_mirrored_pairs_cut_to_the_batch(num: int) -> None:
    t = draw(num, p=0.0, antithetic=True)
    assert len(t) == num
    pairs = t[: num - num % 2].view(-1, 2).sum(1)
    assert (pairs == SPAN.start + SPAN.stop - 1).all()


def _parts():
    torch.manual_seed(0)
    network, base = build_network(TINY_MODEL).double(), build_network(TINY_MODEL).double()
    schedule = read_schedule(TINY_SCHEDULER)
    x0, eps = torch.rand(4, 1, 8, 8).double() * 2 - 1, torch.randn(4, 1, 8, 8).double()
    return network, base, schedule, {"x0": x0, "eps": eps, "t": torch.tensor([0, 30, 60, 99])}


def test_the_two_terms_have_the_gradient_of_one_mse_against_the_mean_target() -> None:
    network, base, schedule, batch = _parts()
    loss = expert_loss(network, base, schedule, **batch, consistency=1.0)
    assert torch.isclose(loss.total, loss.denoising + loss.consistency)
    gradient = torch.autograd.grad(loss.total, next(network.parameters()))[0]

    abar = schedule.alphas_cumprod[batch["t"]][:, None, None, None]
    x_t = abar.sqrt() * batch["x0"] + (1 - abar).sqrt() * batch["eps"]
    mean_target = (batch["eps"] + base(x_t, batch["t"]).sample.detach()) / 2
    single = 2 * ((mean_target - network(x_t, batch["t"]).sample) ** 2).mean()
    expected = torch.autograd.grad(single, next(network.parameters()))[0]
    # the loss is carried in float32
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_without_consistency_the_base_is_not_run() -> None:
    network, _, schedule, batch = _parts()
    loss = expert_loss(network, None, schedule, **batch, consistency=0.0)
    assert loss.consistency == 0
    assert loss.total == loss.denoising


def test_an_expert_equal_to_its_base_has_no_consistency_loss() -> None:
    network, _, schedule, batch = _parts()
    assert expert_loss(network, network, schedule, **batch, consistency=1.0).consistency == 0


def test_learning_rates_rise_then_hold_or_fall_to_zero() -> None:
    constant = FinetuneConfig(steps=100, lr=1.0, warmup=9)
    assert [round(learning_rate(s, constant), 3) for s in (0, 4, 8, 9, 99)] == [0.1, 0.5, 0.9, 1, 1]
    cosine = FinetuneConfig(steps=100, lr=1.0, lr_schedule="cosine")
    linear = FinetuneConfig(steps=100, lr=1.0, lr_schedule="linear")
    assert learning_rate(0, cosine) == learning_rate(0, linear) == 1.0
    assert learning_rate(50, cosine) == pytest.approx(0.5)
    assert learning_rate(75, linear) == pytest.approx(0.25)
    assert learning_rate(99, cosine) < 0.001
