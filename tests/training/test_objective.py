from __future__ import annotations

import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER

from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.denoiser import build_network
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.timesteps import TimestepRange
from deme_cli.training.objective import draw_by_cluster, draw_timesteps, expert_losses
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


def test_draws_from_everywhere_are_all_timesteps_of_the_horizon_equally_often() -> None:
    span, generator = TimestepRange(3, 5), torch.Generator().manual_seed(0)
    counts = torch.bincount(draw_timesteps(8000, span, 8, p=1.0, generator=generator), minlength=8)
    assert len(counts) == 8
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()


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


CLUSTERS = [TimestepRange(250, 251), TimestepRange(251, 300), TimestepRange(300, 500)]


def draw_clusters(num: int, clusters: list[TimestepRange] = CLUSTERS) -> torch.Tensor:
    return draw_by_cluster(num, clusters, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("num", [3, 4, 8, 64])
def test_clusters_have_even_shares_of_a_batch_whatever_their_lengths(num: int) -> None:
    t = draw_clusters(num)
    shares = [sum(draw in cluster for draw in t.tolist()) for cluster in CLUSTERS]
    assert t.dtype == torch.long
    assert sum(shares) == num, "no draw lies outside its cluster"
    assert set(shares) <= {num // 3, -(-num // 3)}


def test_every_timestep_of_a_cluster_is_drawn_equally_often() -> None:
    t = draw_clusters(120_000)
    for cluster in CLUSTERS:
        inside = t[(t >= cluster.start) & (t < cluster.stop)]
        expected = 40_000 / len(cluster)
        counts = torch.bincount(inside - cluster.start, minlength=len(cluster)).double()
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_squared <= len(cluster) - 1 + 5 * (2 * (len(cluster) - 1)) ** 0.5


def _parts():
    torch.manual_seed(0)
    network, base = build_network(TINY_MODEL).double(), build_network(TINY_MODEL).double()
    schedule = read_schedule(TINY_SCHEDULER)
    x0, eps = torch.rand(4, 1, 8, 8).double() * 2 - 1, torch.randn(4, 1, 8, 8).double()
    return network, base, schedule, {"x0": x0, "eps": eps, "t": torch.tensor([0, 30, 60, 99])}


def test_the_two_terms_have_the_gradient_of_one_mse_against_the_mean_target() -> None:
    network, base, schedule, batch = _parts()
    loss = expert_losses(network, base, schedule, **batch, consistency=1.0)
    torch.testing.assert_close(loss.total.detach(), loss.denoising + loss.consistency)
    gradient = torch.autograd.grad(loss.total.mean(), next(network.parameters()))[0]

    abar = schedule.alphas_cumprod[batch["t"]][:, None, None, None]
    x_t = abar.sqrt() * batch["x0"] + (1 - abar).sqrt() * batch["eps"]
    mean_target = (batch["eps"] + base(x_t, batch["t"]).sample.detach()) / 2
    single = 2 * ((mean_target - network(x_t, batch["t"]).sample) ** 2).mean()
    expected = torch.autograd.grad(single, next(network.parameters()))[0]
    # the loss is carried in float32
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_an_expert_without_a_base_or_equal_to_it_has_no_consistency_loss() -> None:
    network, _, schedule, batch = _parts()
    for base, consistency in ((None, 0.0), (network, 1.0)):
        loss = expert_losses(network, base, schedule, **batch, consistency=consistency)
        assert loss.consistency.tolist() == [0] * 4
        assert torch.equal(loss.total, loss.denoising)


@pytest.mark.parametrize("consistency", [0.0, 0.5])
def test_the_losses_are_those_of_each_image_alone(consistency: float) -> None:
    network, base, schedule, batch = _parts()
    together = expert_losses(network, base, schedule, **batch, consistency=consistency)
    for i in range(4):
        one = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        alone = expert_losses(network, base, schedule, **one, consistency=consistency)
        for name in ("total", "denoising", "consistency"):
            found = getattr(together, name)[i : i + 1]
            torch.testing.assert_close(found, getattr(alone, name), rtol=1e-5, atol=1e-7)


def test_learning_rates_rise_then_hold_or_fall_to_zero() -> None:
    constant = FinetuneConfig(steps=100, lr=1.0, warmup=9)
    assert [round(learning_rate(s, constant), 3) for s in (0, 4, 8, 9, 99)] == [0.1, 0.5, 0.9, 1, 1]
    cosine = FinetuneConfig(steps=100, lr=1.0, lr_schedule="cosine")
    linear = FinetuneConfig(steps=100, lr=1.0, lr_schedule="linear")
    assert learning_rate(0, cosine) == learning_rate(0, linear) == 1.0
    assert learning_rate(50, cosine) == pytest.approx(0.5)
    assert learning_rate(75, linear) == pytest.approx(0.25)
    assert learning_rate(99, cosine) < 0.001
