from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deme_cli.training.multitask import (
    NashWeights,
    ProjectedGradients,
    UncertaintyWeights,
    gram,
    nash_weights,
    open_tasks,
    pcgrad_weights,
)

METHODS = ("uw", "nashmtl", "pcgrad")
NUM_TASKS = 3


class Toy(nn.Module):
    """Three tasks that quarrel over a body; the last layer serves the first task only."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Parameter(torch.randn(6, 4, generator=generator))
        self.head = nn.Parameter(torch.randn(4, generator=generator))
        wanted = torch.randn(NUM_TASKS, 6, 4, generator=generator)
        self.wanted = 2 * (wanted - wanted.mean(0))  # bodies in opposite directions

    def losses(self, seed: int = 0) -> Tensor:
        """(3,) with their graph, on a batch of its own for each seed."""
        generator = torch.Generator().manual_seed(100 + seed)
        x = torch.randn(NUM_TASKS, 8, 6, generator=generator)
        distances = (x @ (self.body - self.wanted)).square().mean((1, 2))
        served = (x[0] @ self.body @ self.head).square().mean()
        return torch.stack([distances[0] + served, *distances[1:]])

    def gradients(self, seed: int = 0) -> list[tuple[Tensor | None, ...]]:
        """Of each loss, by parameter."""
        return [
            torch.autograd.grad(self.losses(seed)[i], list(self.parameters()), allow_unused=True)
            for i in range(NUM_TASKS)
        ]

    def gradient_of(self, weights: Tensor, seed: int = 0) -> list[Tensor]:
        """Of sum_i w_i L_i, by parameter."""
        total = (weights.to(torch.float32) * self.losses(seed)).sum()
        return list(torch.autograd.grad(total, list(self.parameters())))


def backward(
    tasks: nn.Module,
    network: nn.Module,
    losses: Tensor,
    *,
    step: int = 0,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    parameters = list(network.parameters())
    return tasks.backward(losses, parameters, step=step, generator=generator, scale=scale)


def grads(network: nn.Module) -> list[Tensor | None]:
    """What lies in `.grad`, taken away."""
    found = [parameter.grad for parameter in network.parameters()]
    network.zero_grad(set_to_none=True)
    return found


def open_all() -> dict[str, nn.Module]:
    return {method: open_tasks(method, NUM_TASKS, every=4) for method in METHODS}


def test_each_method_has_its_module() -> None:
    modules = (UncertaintyWeights, NashWeights, ProjectedGradients)
    assert [type(tasks) for tasks in open_all().values()] == list(modules)


def test_uw_adds_the_gradient_of_kendalls_objective() -> None:
    toy, tasks = Toy(), UncertaintyWeights(NUM_TASKS)
    s = torch.tensor([-1.0, 0.0, 2.0])
    tasks.log_variances.data.copy_(s)
    total = backward(tasks, toy, toy.losses())
    losses = toy.losses().detach()
    torch.testing.assert_close(total, 0.5 * (torch.exp(-s) * losses / 3 + s).sum())
    torch.testing.assert_close(tasks.log_variances.grad, 0.5 * (1 - torch.exp(-s) * losses / 3))
    torch.testing.assert_close(grads(toy), toy.gradient_of(0.5 * torch.exp(-s) / 3))


def test_uw_ends_at_the_logarithm_of_each_loss_over_k() -> None:
    network, tasks = nn.Linear(1, 1), UncertaintyWeights(NUM_TASKS)
    values = torch.tensor([0.01, 0.6, 20.0])
    optimizer = torch.optim.AdamW(tasks.parameters(), lr=0.025, weight_decay=0)
    for _ in range(1500):
        optimizer.zero_grad()
        backward(tasks, network, values.clone().requires_grad_())
        optimizer.step()
    torch.testing.assert_close(tasks.log_variances.data, (values / 3).log(), rtol=0, atol=1e-3)
    assert grads(network) == [None, None]


def test_nash_solves_alpha_only_at_multiples_of_every() -> None:
    toy, tasks = Toy(), NashWeights(NUM_TASKS, every=4)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.01)
    alphas = [tasks.alpha.clone()]
    assert alphas[0].tolist() == [1, 1, 1]
    for step in range(10):
        backward(tasks, toy, toy.losses(step), step=step)
        optimizer.step()
        optimizer.zero_grad()
        alphas.append(tasks.alpha.clone())
    changed = [step for step in range(10) if not torch.equal(alphas[step], alphas[step + 1])]
    assert changed == [0, 4, 8]


@pytest.mark.parametrize("step", [0, 1], ids=["measured", "between"])
def test_nash_adds_the_gradient_of_the_losses_weighed_by_alpha_over_k(step: int) -> None:
    toy, tasks = Toy(), NashWeights(NUM_TASKS, every=4)
    backward(tasks, toy, toy.losses())
    if step:
        grads(toy)
        total = backward(tasks, toy, toy.losses(step), step=step)
        torch.testing.assert_close(total, (tasks.alpha * toy.losses(step)).sum().detach() / 3)
    torch.testing.assert_close(grads(toy), toy.gradient_of(tasks.alpha / 3, step))
    expected = nash_weights(gram(toy.gradients())).float()
    torch.testing.assert_close(tasks.alpha, expected)


def test_nash_measures_the_first_batch_of_an_update_only() -> None:
    toy, tasks = Toy(), NashWeights(NUM_TASKS, every=4)
    backward(tasks, toy, toy.losses(0), step=4)
    alpha = tasks.alpha.clone()
    resumed = NashWeights(NUM_TASKS, every=4)
    resumed.load_state_dict(tasks.state_dict())
    for module in (tasks, resumed):
        backward(module, toy, toy.losses(1), step=4)
        assert torch.equal(module.alpha, alpha)
    backward(tasks, toy, toy.losses(1), step=8)
    assert not torch.equal(tasks.alpha, alpha)


def test_nash_keeps_alpha_where_there_is_no_solution() -> None:
    tasks, toy = NashWeights(2, every=1), nn.Linear(1, 1, bias=False)
    tasks.alpha.copy_(torch.tensor([2.0, 3.0]))
    weight = toy.weight.sum()
    total = backward(tasks, toy, torch.stack([weight, -weight]))
    assert tasks.alpha.tolist() == [2, 3]
    assert toy.weight.grad.item() == -0.5
    torch.testing.assert_close(total, -weight.detach() / 2)


def test_pcgrad_adds_the_projected_gradients() -> None:
    toy = Toy()
    products = gram(toy.gradients())
    c = pcgrad_weights(products, torch.Generator().manual_seed(7))
    assert (c != 1).any(), "the toy's tasks quarrel"
    total = backward(ProjectedGradients(), toy, toy.losses(), step=7)
    torch.testing.assert_close(grads(toy), toy.gradient_of(c))
    torch.testing.assert_close(total, (c.float() * toy.losses()).sum().detach())


@pytest.mark.parametrize("method", METHODS)
def test_the_value_returned_is_a_detached_scalar(method: str) -> None:
    toy = Toy()
    total = backward(open_all()[method], toy, toy.losses())
    assert total.shape == ()
    assert not total.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_scaled_but_neither_the_weights_nor_the_value(method: str) -> None:
    found = []
    for factor in (1.0, 2.0**16):
        toy, tasks = Toy(), open_all()[method]
        total = backward(tasks, toy, toy.losses(), scale=lambda loss, by=factor: loss * by)
        own = [p.grad for p in tasks.parameters()]
        buffers = [b.clone() for b in tasks.buffers()]
        found.append([[g / factor for g in grads(toy) + own], total, buffers])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("step", [0, 1], ids=["measured", "between"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_added_to_what_is_there(method: str, step: int) -> None:
    toy, tasks = Toy(), open_all()[method]
    backward(copy.deepcopy(tasks), toy, toy.losses(), step=step)
    alone = grads(toy)
    toy.body.grad = torch.ones_like(toy.body)
    backward(tasks, toy, toy.losses(), step=step)
    torch.testing.assert_close(grads(toy), [alone[0] + 1, alone[1]])


@pytest.mark.parametrize("method", ["uw", "nashmtl"])
def test_two_batches_at_half_scale_make_the_update_of_their_mean(method: str) -> None:
    toy, tasks = Toy(), open_all()[method]
    for seed in (0, 1):
        backward(tasks, toy, toy.losses(seed), step=1, scale=lambda loss: loss / 2)
    own = [p.grad for p in tasks.parameters()]
    accumulated = grads(toy) + own
    tasks.zero_grad()
    backward(tasks, toy, (toy.losses(0) + toy.losses(1)) / 2, step=1)
    torch.testing.assert_close(accumulated, grads(toy) + [p.grad for p in tasks.parameters()])


@pytest.mark.parametrize("step", [0, 1], ids=["measured", "between"])
@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_no_loss_uses_gets_no_gradient(method: str, step: int) -> None:
    toy = Toy()
    toy.unused = nn.Parameter(torch.zeros(2))
    backward(open_all()[method], toy, toy.losses(), step=step)
    body, head, unused = grads(toy)
    assert unused is None
    assert body.abs().sum() > 0
    assert head.abs().sum() > 0


def steps(network: Toy, tasks: nn.Module, span: range) -> None:
    """Plain descent over the updates of `span`, two batches each."""
    for step in span:
        for micro in range(2):
            backward(tasks, network, network.losses(2 * step + micro), step=step)
        with torch.no_grad():
            for p in (*network.parameters(), *tasks.parameters()):
                p -= 0.01 * p.grad
                p.grad = None


@pytest.mark.parametrize("stop", [3, 4, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_continues_as_if_nothing_had_happened(method: str, stop: int) -> None:
    whole, tasks = Toy(), open_all()[method]
    steps(whole, tasks, range(9))
    cut, before, after = Toy(), open_all()[method], open_all()[method]
    steps(cut, before, range(stop))
    after.load_state_dict(before.state_dict())
    steps(cut, after, range(stop, 9))
    for found, expected in ((cut, whole), (after, tasks)):
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["nashmtl", "pcgrad"])
def test_an_overflow_reaches_the_gradients_and_leaves_the_weights(method: str) -> None:
    toy, tasks = Toy(), open_all()[method]
    backward(tasks, toy, toy.losses(), scale=lambda loss: loss * math.inf)
    assert not all(g.isfinite().all() for g in grads(toy))
    for buffer in tasks.buffers():
        assert buffer.isfinite().all()
    if method == "nashmtl":
        assert tasks.alpha.tolist() == [1, 1, 1]


@pytest.mark.parametrize("method", ["nashmtl", "pcgrad"])
def test_an_overflow_of_scaled_gradients_leaves_the_value_finite(method: str) -> None:
    toy = nn.Linear(1, 1, bias=False)
    weight = toy.weight.sum()
    losses = torch.stack([-1e20 * weight, weight])
    total = backward(open_tasks(method, 2, every=1), toy, losses, scale=lambda loss: loss * 1e30)
    assert total.isfinite()
    assert not toy.weight.grad.isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_each_method_lowers_the_loss_of_every_task(method: str) -> None:
    """Three views of one regression, with noise of their own: all can be served."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 32, n, generator=generator) for n in (6, 1))
    y = x @ torch.randn(6, 1, generator=generator) + 0.3 * noise
    network, tasks = nn.Linear(6, 1, bias=False), open_tasks(method, 3, every=5)
    nn.init.zeros_(network.weight)
    optimizer = torch.optim.AdamW([*network.parameters(), *tasks.parameters()], lr=0.02)

    def losses() -> Tensor:
        return torch.stack([functional.mse_loss(network(x[i]), y[i]) for i in range(3)])

    before = losses().detach()
    for step in range(200):
        optimizer.zero_grad()
        backward(tasks, network, losses(), step=step)
        optimizer.step()
    assert (losses() < 0.1 * before).all()
