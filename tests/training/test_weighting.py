"""Weights of timesteps against numpy, diffusers, and gradients that are worked out by hand.

T timesteps, B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_SCHEDULER
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from deme_cli.config import WEIGHTINGS, FinetuneConfig
from deme_cli.diffusion.schedule import FlowSchedule, NoiseSchedule, Schedule, read_schedule
from deme_cli.errors import ConfigError
from deme_cli.timesteps import TimestepRange
from deme_cli.training.multitask import open_tasks
from deme_cli.training.weighting import Reduction, Uncertainty, loss_weights, noise_levels

LINEAR = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
ABAR = torch.tensor([0.9999, 0.97, 0.8, 0.5, 0.2, 0.01], dtype=torch.float64)
SIGMAS = torch.tensor([0.01, 0.2, 0.4, 0.5, 0.8, 0.999], dtype=torch.float64)
NAMES = [name for name in WEIGHTINGS if name not in ("none", "uncertainty")]
X0_WEIGHTS = {  # of the loss of x_0, as published: f(SNR, gamma, k)
    "uniform": lambda snr, gamma, k: snr,
    "snr+1": lambda snr, gamma, k: snr + 1,
    "truncated-snr": lambda snr, gamma, k: np.maximum(snr, 1),
    "min-snr": lambda snr, gamma, k: np.minimum(snr, gamma),
    "soft-min-snr": lambda snr, gamma, k: snr * gamma / (snr + gamma),
    "p2": lambda snr, gamma, k: snr / (k + snr) ** gamma,
}
OVER = {"epsilon": lambda snr: snr, "sample": np.ones_like, "v_prediction": lambda snr: snr + 1}


def linear(prediction_type: str = "epsilon", **options: object) -> Schedule:
    return read_schedule({**LINEAR, "prediction_type": prediction_type, **options})


def test_mean_and_share_of_the_noisiest_quarter_are_the_published_ones() -> None:
    for name, mean, share in [
        ("snr+1", 1312, 0.983),
        ("truncated-snr", 1311, 0.983),
        ("min-snr", 0.913, 0.274),
        ("p2", 0.724, 0.345),
    ]:
        weights = loss_weights(linear(), name)
        assert weights.dtype == torch.float64
        assert weights.mean().item() == pytest.approx(mean, rel=1e-3)
        assert (weights[750:].sum() / weights.sum()).item() == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_that_of_the_table(name: str) -> None:
    published = 1.0 if name == "p2" else 5.0
    for prediction_type, gamma, k in [
        ("epsilon", None, 1.0), ("sample", 0.5, 2.0), ("v_prediction", 3.0, 0.5),
    ]:  # fmt: skip
        schedule = linear(prediction_type)
        snr = schedule.snr.numpy()
        expected = X0_WEIGHTS[name](snr, gamma or published, k) / OVER[prediction_type](snr)
        weights = loss_weights(schedule, name, gamma=gamma, k=k)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-10)


def test_min_snr_is_the_recipe_of_the_diffusers_scripts() -> None:
    for prediction_type, added in (("epsilon", 0), ("v_prediction", 1)):
        scheduler = DDPMScheduler.from_config({**LINEAR, "prediction_type": prediction_type})
        oracle = compute_snr(scheduler, torch.arange(1000))
        weights = loss_weights(linear(prediction_type), "min-snr", gamma=5.0)
        expected = oracle.clamp(max=5.0) / (oracle + added)
        torch.testing.assert_close(weights.float(), expected, rtol=1e-5, atol=0)


def weighted_gradient(schedule: Schedule, name: str, signal: Tensor, noise: Tensor) -> Tensor:
    """d/d theta of mean_t w(t) ||target - output||^2 of one small network that predicts x_0."""
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    x0, eps = torch.randn(len(signal), 3, **draw), torch.randn(len(signal), 3, **draw)
    theta = nn.Parameter(torch.randn(3, 3, **draw))
    t = torch.arange(len(signal))
    signal, noise = signal[:, None], noise[:, None]
    x_t = signal * x0 + noise * eps  # the same network input whatever the target
    found = torch.tanh(x_t @ theta)
    its_eps = (x_t - signal * found) / noise
    read = SimpleNamespace(
        epsilon=its_eps, sample=found, v_prediction=signal * its_eps - noise * found,
        flow=its_eps - found,
    )  # fmt: skip
    error = schedule.target(x0, eps, t) - getattr(read, schedule.prediction_type)
    loss = (loss_weights(schedule, name) * error.square().mean(1)).mean()
    return torch.autograd.grad(loss, theta)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_objective_is_the_same_whatever_the_network_predicts(name: str) -> None:
    signal, noise = ABAR.sqrt(), (1 - ABAR).sqrt()
    expected = weighted_gradient(NoiseSchedule(ABAR, "sample"), name, signal, noise)
    for prediction_type in ("epsilon", "v_prediction"):
        found = weighted_gradient(NoiseSchedule(ABAR, prediction_type), name, signal, noise)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    signal, noise = 1 - SIGMAS, SIGMAS
    abar = signal.square() / (signal.square() + noise.square())  # the abar of the same SNR
    found = weighted_gradient(FlowSchedule(SIGMAS), name, signal, noise)
    expected = weighted_gradient(NoiseSchedule(abar, "sample"), name, signal, noise)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def zero_terminal(prediction_type: str) -> Schedule:
    return linear(prediction_type, rescale_betas_zero_snr=True)


def test_where_there_is_no_signal_noise_has_the_limit_of_its_weight_or_none() -> None:
    for name in ("snr+1", "truncated-snr"):
        with pytest.raises(ConfigError, match=rf"{name.replace('+', '.')}: no finite .* t = 999"):
            loss_weights(zero_terminal("epsilon"), name)
    for name, expected in [("uniform", 1), ("min-snr", 1), ("soft-min-snr", 1), ("p2", 2.0**-3)]:
        gamma = 3.0 if name == "p2" else None
        weights = loss_weights(zero_terminal("epsilon"), name, gamma=gamma, k=2.0)
        assert weights[-1].item() == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_other_targets_can_be_weighed_in_pure_noise_and_velocities_without_noise(name: str) -> None:
    flow = FlowSchedule(torch.linspace(0.001, 1, 1000, dtype=torch.float64))
    for schedule in (zero_terminal("sample"), zero_terminal("v_prediction"), flow):
        weights = loss_weights(schedule, name)
        assert weights.isfinite().all()
        # w_x0 at SNR 0
        assert weights[-1].item() == {"snr+1": 1.0, "truncated-snr": 1.0}.get(name, 0.0)
    abar, sigmas = torch.cat([torch.ones(1), ABAR]), torch.cat([torch.zeros(1), SIGMAS])
    for schedule in (NoiseSchedule(abar, "v_prediction"), FlowSchedule(sigmas)):
        weights = loss_weights(schedule, name, gamma=0.5)
        assert weights.isfinite().all()
        assert weights[0].item() == (1.0 if name in ("uniform", "snr+1", "truncated-snr") else 0.0)
    with pytest.raises(ConfigError, match=r"uniform: .* t = 0, .* ratio is inf"):
        loss_weights(NoiseSchedule(abar, "sample"), "uniform")


TINY = read_schedule(TINY_SCHEDULER)  # T = 100, predicts the noise


@pytest.fixture
def uncertainty() -> Uncertainty:
    """u with weights as training may leave them."""
    uncertainty = Uncertainty(TINY)
    uncertainty.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return uncertainty


def test_training_begins_as_the_plain_loss() -> None:
    losses = torch.linspace(0.1, 3, 100, requires_grad=True)
    weighed = Uncertainty(TINY).weigh(losses, torch.arange(100))
    assert torch.equal(weighed, losses.mean())
    assert torch.equal(*torch.autograd.grad(weighed, losses), torch.full((100,), 0.01))


def test_u_is_one_linear_layer_on_the_fourier_features_of_the_noise_level(
    uncertainty: Uncertainty,
) -> None:
    turns = torch.outer(TINY.snr.double() ** -0.5, torch.ones(128)).log() / 4
    turns = turns * uncertainty.frequencies.double() + uncertainty.phases.double()
    features = 2**0.5 * torch.cos(2 * torch.pi * turns)
    expected = features @ uncertainty.weight.double() + uncertainty.bias.double()
    found = uncertainty(torch.arange(100))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    before = torch.get_rng_state()
    again, other = Uncertainty(TINY), Uncertainty(TINY, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("frequencies", "phases"):  # drawn from the seed
        assert torch.equal(getattr(uncertainty, name), getattr(again, name))
        assert not torch.equal(getattr(uncertainty, name), getattr(other, name))
    other.load_state_dict(uncertainty.state_dict())  # restores all of u
    assert torch.equal(other(torch.arange(100)), found)


def test_pure_noise_and_no_noise_count_as_their_neighbours() -> None:
    for schedule in (
        NoiseSchedule(torch.tensor([1, 0.9, 0.5, 0.1, 0], dtype=torch.float64), "v_prediction"),
        FlowSchedule(torch.tensor([0, 0.1, 0.5, 0.9, 1], dtype=torch.float64)),
    ):
        levels = noise_levels(schedule)
        assert levels[0] == levels[1] < levels[2] < levels[3] == levels[4]
        assert Uncertainty(schedule)(torch.arange(5)).isfinite().all()


CLUSTERS = [TimestepRange(0, 30), TimestepRange(30, 60), TimestepRange(60, 100)]
EDGES = torch.tensor([0, 29, 30, 59, 60, 99, 99])  # two, two and three images of the clusters
OF_CLUSTER = [[0, 1], [2, 3], [4, 5, 6]]


class Toy(nn.Module):
    """A loss per image of a regression on five weights."""

    def __init__(self, num: int = len(EDGES)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.theta = nn.Parameter(torch.randn(5, generator=generator))
        self.x = torch.randn(num, 5, generator=generator)
        self.y = torch.randn(num, generator=generator)

    def losses(self) -> Tensor:
        """(B,) with their graph."""
        return (self.x @ self.theta - self.y).square()

    def gradients(self) -> Tensor:
        """Of each image, by hand.  (B, 5)"""
        return (2 * (self.x @ self.theta - self.y)[:, None] * self.x).detach()


def reduction_of(**settings: object) -> Reduction:
    config = FinetuneConfig(**{"clusters": 3, "batch_size": 7, **settings})
    clusters = CLUSTERS if config.multitask != "none" else ()
    return Reduction(config, TINY, clusters)


def backward(
    reduction: Reduction, toy: Toy, t: Tensor = EDGES, *, images: slice = slice(None),
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensor:  # fmt: skip
    """The value of a batch; its gradient is added to `toy.theta.grad`."""
    return reduction.backward(
        toy.losses()[images], t[images], list(toy.parameters()), step=0,
        generator=torch.Generator().manual_seed(0), scale=scale,
    )  # fmt: skip


def test_the_plain_loss_is_the_mean_over_the_images() -> None:
    toy = Toy()
    total = backward(reduction_of(), toy)
    torch.testing.assert_close(total, toy.losses().mean().detach())
    torch.testing.assert_close(toy.theta.grad, toy.gradients().mean(0))


RATIO = TINY.snr


@pytest.mark.parametrize(("name", "normalise"), [("min-snr", False), ("p2", True)])
def test_a_weighting_multiplies_the_loss_of_each_image_by_the_weight_of_its_timestep(
    name: str, normalise: bool
) -> None:
    options, table = {  # on the loss of the noise
        "min-snr": ({"weighting_gamma": 3.0}, (3 / RATIO).clamp(max=1)),
        "p2": ({"weighting_gamma": 0.5, "weighting_k": 2.0}, (2 + RATIO) ** -0.5),
    }[name]
    toy = Toy()
    reduction = reduction_of(loss_weighting=name, normalise_weighting=normalise, **options)
    total = backward(reduction, toy)
    weights = (table / table.mean() if normalise else table)[EDGES].float()
    torch.testing.assert_close(total, (weights * toy.losses()).mean().detach())
    torch.testing.assert_close(toy.theta.grad, (weights[:, None] * toy.gradients()).mean(0))


def test_learned_weights_divide_each_gradient_by_exp_u() -> None:
    reduction, toy = reduction_of(loss_weighting="uncertainty"), Toy()
    reduction.uncertainty.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    u = reduction.uncertainty(EDGES).detach()
    assert u.std() > 0.1, "the timesteps are weighed unlike"
    total = backward(reduction, toy)
    losses = toy.losses().detach()
    torch.testing.assert_close(total, (losses / u.exp() + u).mean())
    torch.testing.assert_close(toy.theta.grad, (toy.gradients() / u.exp()[:, None]).mean(0))
    torch.testing.assert_close(reduction.uncertainty.bias.grad, (1 - losses / u.exp()).mean())
    assert reduction.own_lr is None, "they learn at the network's rate"


def task_losses(toy: Toy, t: Tensor) -> Tensor:
    """L_i, which UW shows at s = 0: the gradient of s_i is (1 - L_i / k) / 2.  -> (k,)"""
    reduction = reduction_of(multitask="uw")
    backward(reduction, toy, t)
    return 3 * (1 - 2 * reduction.tasks.log_variances.grad)


def test_the_loss_of_a_task_is_the_mean_over_the_images_of_its_cluster() -> None:
    toy = Toy()
    found, losses = task_losses(toy, EDGES), toy.losses().detach()
    expected = torch.stack([losses[images].mean() for images in OF_CLUSTER])
    torch.testing.assert_close(found, expected)
    gradients = torch.stack([toy.gradients()[images].mean(0) for images in OF_CLUSTER])
    torch.testing.assert_close(toy.theta.grad, gradients.sum(0) / 2 / 3)


def test_the_last_timestep_of_a_cluster_is_the_one_before_its_stop() -> None:
    toy = Toy(num=4)
    toy.x, toy.y = torch.zeros(4, 5), torch.tensor([0.0, 0.0, 0.0, 3.0])  # losses 0, 0, 0, 9
    for t, cluster in [(29, 0), (30, 1), (59, 1), (60, 2)]:
        expected = torch.zeros(3)
        expected[cluster] = 9 / 2
        torch.testing.assert_close(task_losses(toy, torch.tensor([5, 45, 80, t])), expected)


def test_the_losses_are_weighed_before_their_clusters_are_balanced() -> None:
    settings = {"loss_weighting": "p2", "weighting_gamma": 0.7}
    toy, alone = Toy(), Toy()
    total = backward(reduction_of(multitask="nashmtl", **settings), toy)
    weighed = ((1 + RATIO) ** -0.7)[EDGES].float() * alone.losses()
    means = torch.stack([weighed[images].mean() for images in OF_CLUSTER])
    expected = open_tasks("nashmtl", 3, every=25).backward(
        means, [alone.theta], step=0, generator=torch.Generator(), scale=lambda loss: loss
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(toy.theta.grad, alone.theta.grad)


def test_the_gradient_is_scaled_the_value_is_not_and_two_halves_are_the_batch() -> None:
    t = torch.tensor([0, 29, 30, 59, 60, 99, 3, 7, 31, 44, 70, 98])
    for weighting in ("none", "min-snr", "uncertainty"):
        whole, halves = (reduction_of(loss_weighting=weighting) for _ in range(2))
        toy, other = Toy(12), Toy(12)
        total = backward(whole, toy, t, scale=lambda loss: loss * 1024)
        assert (total.shape, total.requires_grad) == ((), False)
        parts = [
            backward(halves, other, t, images=images, scale=lambda loss: loss / 2)
            for images in (slice(6), slice(6, 12))
        ]
        torch.testing.assert_close(sum(parts) / 2, total)
        torch.testing.assert_close(other.theta.grad, toy.theta.grad / 1024)
        for one, another in zip(halves.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(one.grad, another.grad / 1024)


def test_only_what_is_learned_is_kept_with_a_run() -> None:
    for settings, kept, trained in [
        ({}, set(), []),
        ({"loss_weighting": "min-snr"}, set(), []),
        ({"multitask": "pcgrad"}, set(), []),
        ({"multitask": "uw"}, {"tasks.log_variances"}, ["tasks.log_variances"]),
        ({"multitask": "nashmtl"}, {"tasks.alpha", "tasks.measured_at"}, []),
        ({"loss_weighting": "uncertainty"},
         {f"uncertainty.{n}" for n in ("weight", "bias", "frequencies", "phases", "noise_levels")},
         ["uncertainty.weight", "uncertainty.bias"]),
    ]:  # fmt: skip
        reduction = reduction_of(**settings)
        assert set(reduction.state_dict()) == kept
        assert [name for name, _ in reduction.named_parameters()] == trained
