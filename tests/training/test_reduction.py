"""What becomes of the losses of a batch's images, against gradients that are worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import TINY_SCHEDULER
from torch import Tensor, nn

from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.schedule import NoiseSchedule, read_schedule
from deme_cli.errors import ConfigError
from deme_cli.timesteps import TimestepRange
from deme_cli.training.multitask import open_tasks
from deme_cli.training.weighting import Reduction

SCHEDULE = read_schedule(TINY_SCHEDULER)  # T = 100, predicts the noise
CLUSTERS = [TimestepRange(0, 30), TimestepRange(30, 60), TimestepRange(60, 100)]
EDGES = torch.tensor([0, 29, 30, 59, 60, 99, 99])  # two, two and three images of the clusters
OF_CLUSTER = [[0, 1], [2, 3], [4, 5, 6]]
BRANCHES = {
    "plain": {},
    "weighted": {"loss_weighting": "min-snr"},
    "uncertainty": {"loss_weighting": "uncertainty"},
    "uw": {"multitask": "uw"},
    "nashmtl": {"multitask": "nashmtl"},
    "pcgrad": {"multitask": "pcgrad"},
    "weighted uw": {"loss_weighting": "p2", "multitask": "uw"},
}


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
    return Reduction(config, SCHEDULE, clusters)


def backward(
    reduction: Reduction,
    toy: Toy,
    t: Tensor = EDGES,
    *,
    step: int = 0,
    images: slice = slice(None),
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensor:
    """The value of a batch; its gradient is added to `toy.theta.grad`."""
    generator = torch.Generator().manual_seed(step)
    losses = toy.losses()[images]
    parameters = list(toy.parameters())
    return reduction.backward(
        losses, t[images], parameters, step=step, generator=generator, scale=scale
    )


def test_the_plain_loss_is_the_mean_over_the_images() -> None:
    toy = Toy()
    total = backward(reduction_of(), toy)
    torch.testing.assert_close(total, toy.losses().mean().detach())
    torch.testing.assert_close(toy.theta.grad, toy.gradients().mean(0))


RATIO = SCHEDULE.snr
BY_HAND = {  # on the loss of the noise
    "uniform": ({}, torch.ones(100)),
    "snr+1": ({}, 1 + 1 / RATIO),
    "truncated-snr": ({}, (1 / RATIO).clamp(min=1)),
    "min-snr": ({"weighting_gamma": 3.0}, (3 / RATIO).clamp(max=1)),
    "soft-min-snr": ({"weighting_gamma": 3.0}, 3 / (RATIO + 3)),
    "p2": ({"weighting_gamma": 0.5, "weighting_k": 2.0}, (2 + RATIO) ** -0.5),
}


@pytest.mark.parametrize("normalise", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("name", list(BY_HAND))
def test_a_weighting_multiplies_the_loss_of_each_image_by_the_weight_of_its_timestep(
    name: str, normalise: bool
) -> None:
    options, table = BY_HAND[name]
    toy = Toy()
    total = backward(
        reduction_of(loss_weighting=name, normalise_weighting=normalise, **options), toy
    )
    weights = (table / table.mean() if normalise else table)[EDGES].float()
    torch.testing.assert_close(total, (weights * toy.losses()).mean().detach())
    torch.testing.assert_close(toy.theta.grad, (weights[:, None] * toy.gradients()).mean(0))


def test_learned_weights_divide_each_gradient_by_exp_u() -> None:
    reduction, toy = reduction_of(loss_weighting="uncertainty", seed=5), Toy()
    reduction.uncertainty.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    u = reduction.uncertainty(EDGES).detach()
    assert u.std() > 0.1, "the timesteps are weighed unlike"
    total = backward(reduction, toy)
    losses = toy.losses().detach()
    torch.testing.assert_close(total, (losses / u.exp() + u).mean())
    torch.testing.assert_close(toy.theta.grad, (toy.gradients() / u.exp()[:, None]).mean(0))
    torch.testing.assert_close(reduction.uncertainty.bias.grad, (1 - losses / u.exp()).mean())
    assert reduction.own_lr is None, "they learn at the network's rate"


def task_losses(reduction: Reduction, toy: Toy, t: Tensor) -> Tensor:
    """L_i, which UW shows at s = 0: the gradient of s_i is (1 - L_i / k) / 2.  -> (k,)"""
    backward(reduction, toy, t)
    k = len(CLUSTERS)
    return k * (1 - 2 * reduction.tasks.log_variances.grad)


def test_the_loss_of_a_task_is_the_mean_over_the_images_of_its_cluster() -> None:
    toy = Toy()
    found = task_losses(reduction_of(multitask="uw"), toy, EDGES)
    losses = toy.losses().detach()
    expected = torch.stack([losses[images].mean() for images in OF_CLUSTER])
    torch.testing.assert_close(found, expected)
    gradients = torch.stack([toy.gradients()[images].mean(0) for images in OF_CLUSTER])
    torch.testing.assert_close(toy.theta.grad, gradients.sum(0) / 2 / 3)


@pytest.mark.parametrize(("t", "cluster"), [(29, 0), (30, 1), (59, 1), (60, 2)])
def test_the_last_timestep_of_a_cluster_is_the_one_before_its_stop(t: int, cluster: int) -> None:
    toy = Toy(num=4)
    toy.x, toy.y = torch.zeros(4, 5), torch.tensor([0.0, 0.0, 0.0, 3.0])  # losses 0, 0, 0, 9
    found = task_losses(reduction_of(multitask="uw"), toy, torch.tensor([5, 45, 80, t]))
    expected = torch.zeros(3)
    expected[cluster] = 9 / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weighting", ["none", "min-snr", "p2"])
@pytest.mark.parametrize("method", ["uw", "nashmtl", "pcgrad"])
def test_the_losses_are_weighed_before_their_clusters_are_balanced(
    method: str, weighting: str
) -> None:
    settings = {"weighting_gamma": 0.7} if weighting != "none" else {}
    reduction = reduction_of(multitask=method, loss_weighting=weighting, **settings)
    toy, alone = Toy(), Toy()
    total = backward(reduction, toy, step=0)

    table = {"none": torch.ones(100), "min-snr": (0.7 / RATIO).clamp(max=1)}
    weights = table.get(weighting, (1 + RATIO) ** -0.7)[EDGES].float()
    weighed = weights * alone.losses()
    means = torch.stack([weighed[images].mean() for images in OF_CLUSTER])
    expected = open_tasks(method, 3, every=25).backward(
        means, [alone.theta], step=0, generator=torch.Generator().manual_seed(0),
        scale=lambda loss: loss,
    )  # fmt: skip
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(toy.theta.grad, alone.theta.grad)


@pytest.mark.parametrize("settings", BRANCHES.values(), ids=BRANCHES)
def test_the_gradient_is_scaled_and_the_value_is_not(settings: dict) -> None:
    found = []
    for factor in (1.0, 1024.0):
        reduction, toy = reduction_of(**settings), Toy()
        total = backward(reduction, toy, scale=lambda loss, by=factor: loss * by)
        own = [parameter.grad / factor for parameter in reduction.parameters()]
        found.append([total, toy.theta.grad / factor, *own])
        assert total.shape == ()
        assert not total.requires_grad
    torch.testing.assert_close(found[0], found[1])


SUMS = [name for name in BRANCHES if name != "pcgrad"]  # which projects within each batch


@pytest.mark.parametrize("name", SUMS)
def test_two_halves_accumulated_are_the_batch_of_both(name: str) -> None:
    t = torch.tensor([0, 29, 30, 59, 60, 99, 3, 7, 31, 44, 70, 98])  # two of each in each half
    whole, halves = reduction_of(**BRANCHES[name]), reduction_of(**BRANCHES[name])
    toy, other = Toy(12), Toy(12)
    total = backward(whole, toy, t, step=1)
    parts = [
        backward(halves, other, t, step=1, images=images, scale=lambda loss: loss / 2)
        for images in (slice(6), slice(6, 12))
    ]
    torch.testing.assert_close(sum(parts) / 2, total)
    torch.testing.assert_close(other.theta.grad, toy.theta.grad)
    for one, another in zip(halves.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, another.grad)


def test_only_what_is_learned_is_kept_with_a_run() -> None:
    kept = {name: set(reduction_of(**BRANCHES[name]).state_dict()) for name in BRANCHES}
    assert kept["plain"] == kept["weighted"] == kept["pcgrad"] == set()
    assert kept["uw"] == kept["weighted uw"] == {"tasks.log_variances"}
    assert kept["nashmtl"] == {"tasks.alpha", "tasks.measured_at"}
    assert {"uncertainty.weight", "uncertainty.bias"} < kept["uncertainty"]
    trained = {name: [n for n, _ in reduction_of(**BRANCHES[name]).named_parameters()]
               for name in ("uw", "nashmtl", "uncertainty")}  # fmt: skip
    assert trained == {
        "uw": ["tasks.log_variances"],
        "nashmtl": [],
        "uncertainty": ["uncertainty.weight", "uncertainty.bias"],
    }


def test_u_is_drawn_by_the_seed_of_the_run() -> None:
    one, same, other = (
        reduction_of(loss_weighting="uncertainty", seed=seed).uncertainty.frequencies
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_weighting_without_a_finite_weight_is_refused_when_the_run_begins() -> None:
    no_signal = NoiseSchedule(torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64), "epsilon")
    with pytest.raises(ConfigError, match=r"snr\+1: no finite weight at t = 2"):
        Reduction(FinetuneConfig(loss_weighting="snr+1"), no_signal)
