from __future__ import annotations

import pytest
import torch
from conftest import TINY_SCHEDULER

from deme_cli.diffusion.schedule import FlowSchedule, NoiseSchedule, read_schedule
from deme_cli.training.weighting import Uncertainty, noise_levels

SCHEDULE = read_schedule(TINY_SCHEDULER)  # T = 100
T = torch.arange(100)
LOSSES = {5: 0.003, 50: 0.2, 95: 4.0}  # of three timesteps, far apart in size


def trained() -> Uncertainty:
    """u after full-batch descent on the constant losses above."""
    uncertainty = Uncertainty(SCHEDULE)
    t, losses = torch.tensor(list(LOSSES)), torch.tensor(list(LOSSES.values()))
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.01)
    for _ in range(2000):
        optimizer.zero_grad()
        uncertainty.weigh(losses, t).backward()
        optimizer.step()
    return uncertainty


@pytest.fixture(scope="module")
def uncertainty() -> Uncertainty:
    return trained()


def test_training_begins_as_the_plain_loss() -> None:
    losses = torch.linspace(0.1, 3, 100, requires_grad=True)
    weighed = Uncertainty(SCHEDULE).weigh(losses, T)
    assert torch.equal(weighed, losses.mean())
    assert torch.equal(*torch.autograd.grad(weighed, losses), torch.full((100,), 0.01))


def test_descent_ends_at_the_logarithm_of_the_loss_of_each_timestep(
    uncertainty: Uncertainty,
) -> None:
    u = uncertainty(torch.tensor(list(LOSSES)))
    torch.testing.assert_close(u, torch.tensor(list(LOSSES.values())).log(), rtol=0, atol=1e-3)


def test_every_learned_timestep_then_pulls_alike(uncertainty: Uncertainty) -> None:
    """L = theta^2 / 2 per timestep: d ln theta of L / exp(u) is 2, whatever the size of L."""
    log_theta = torch.zeros(3, requires_grad=True)
    losses = torch.tensor(list(LOSSES.values())) * torch.exp(2 * log_theta)
    weighed = uncertainty.weigh(losses, torch.tensor(list(LOSSES)))
    pulls = torch.autograd.grad(weighed, log_theta)[0]
    torch.testing.assert_close(pulls, torch.full((3,), 2 / 3), rtol=2e-3, atol=0)


def test_the_gradient_of_the_network_is_scaled_by_exp_minus_u(uncertainty: Uncertainty) -> None:
    losses = torch.rand(100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradient = torch.autograd.grad(uncertainty.weigh(losses, T), losses)[0]
    torch.testing.assert_close(gradient, torch.exp(-uncertainty(T)) / 100)


def test_u_is_one_linear_layer_on_the_fourier_features_of_the_noise_level(
    uncertainty: Uncertainty,
) -> None:
    turns = torch.outer(SCHEDULE.snr.double() ** -0.5, torch.ones(128)).log() / 4
    turns = turns * uncertainty.frequencies.double() + uncertainty.phases.double()
    features = 2**0.5 * torch.cos(2 * torch.pi * turns)
    expected = features @ uncertainty.weight.double() + uncertainty.bias.double()
    torch.testing.assert_close(uncertainty(T).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_state_dict_restores_all_of_u(uncertainty: Uncertainty) -> None:
    other = Uncertainty(SCHEDULE, seed=1)
    other.load_state_dict(uncertainty.state_dict())
    assert torch.equal(other(T), uncertainty(T))


def test_the_features_follow_the_seed_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (Uncertainty(SCHEDULE, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    for name in ("frequencies", "phases"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(torch.tensor([1, 0.9, 0.5, 0.1, 0], dtype=torch.float64), "v_prediction"),
        FlowSchedule(torch.tensor([0, 0.1, 0.5, 0.9, 1], dtype=torch.float64)),
    ],
    ids=lambda schedule: schedule.prediction_type,
)
def test_pure_noise_and_no_noise_count_as_their_neighbours(schedule) -> None:
    levels = noise_levels(schedule)
    assert levels[0] == levels[1] < levels[2] < levels[3] == levels[4]
    assert Uncertainty(schedule)(torch.arange(5)).isfinite().all()
