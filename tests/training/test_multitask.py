"""How clusters share an update: every method against its paper, on tasks that quarrel."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Toy(nn.Module):
    """Three tasks that quarrel over a body; the last layer serves the first task only."""

    def __init__(self) -> None:
        super().__init__()
        generator = seeded(0)
        self.body = nn.Parameter(torch.randn(6, 4, generator=generator))
        self.head = nn.Parameter(torch.randn(4, generator=generator))
        wanted = torch.randn(NUM_TASKS, 6, 4, generator=generator)
        self.wanted = 2 * (wanted - wanted.mean(0))  # bodies in opposite directions

    def losses(self, seed: int = 0) -> Tensor:
        """(3,) with their graph, on a batch of its own for each seed."""
        x = torch.randn(NUM_TASKS, 8, 6, generator=seeded(100 + seed))
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
    tasks: nn.Module, network: nn.Module, losses: Tensor, *, step: int = 0,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensor:  # fmt: skip
    parameters = list(network.parameters())
    return tasks.backward(losses, parameters, step=step, generator=seeded(step), scale=scale)


def grads(network: nn.Module) -> list[Tensor | None]:
    """What lies in `.grad`, taken away."""
    found = [parameter.grad for parameter in network.parameters()]
    network.zero_grad(set_to_none=True)
    return found


def test_uw_adds_the_gradient_of_kendalls_objective() -> None:
    toy, tasks = Toy(), UncertaintyWeights(NUM_TASKS)
    s = torch.tensor([-1.0, 0.0, 2.0])
    tasks.log_variances.data.copy_(s)
    total = backward(tasks, toy, toy.losses())
    losses = toy.losses().detach()
    torch.testing.assert_close(total, 0.5 * (torch.exp(-s) * losses / 3 + s).sum())
    torch.testing.assert_close(tasks.log_variances.grad, 0.5 * (1 - torch.exp(-s) * losses / 3))
    torch.testing.assert_close(grads(toy), toy.gradient_of(0.5 * torch.exp(-s) / 3))


def test_nash_adds_the_gradient_of_the_losses_weighed_by_alpha_over_k() -> None:
    toy, tasks = Toy(), NashWeights(NUM_TASKS, every=4)
    assert tasks.alpha.tolist() == [1, 1, 1]
    for step in range(9):  # solved at 0, 4 and 8
        before = tasks.alpha.clone()
        total = backward(tasks, toy, toy.losses(step), step=step)
        assert torch.equal(tasks.alpha, before) == (step % 4 > 0)
        if step % 4 == 0:
            solved = nash_weights(gram(toy.gradients(step))).float()
            torch.testing.assert_close(tasks.alpha, solved)
        torch.testing.assert_close(total, (tasks.alpha * toy.losses(step)).sum().detach() / 3)
        torch.testing.assert_close(grads(toy), toy.gradient_of(tasks.alpha / 3, step))


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
    c = pcgrad_weights(products, seeded(7))
    assert (c != 1).any(), "the toy's tasks quarrel"
    losses = toy.losses()
    total = backward(ProjectedGradients(), toy, losses, step=7)
    with pytest.raises(RuntimeError, match="second time"):  # their graph is freed
        losses[0].backward()
    torch.testing.assert_close(grads(toy), toy.gradient_of(c))
    torch.testing.assert_close(total, (c.float() * toy.losses()).sum().detach())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_scaled_and_added_to_what_is_there_and_the_value_is_not(method: str) -> None:
    for step in (0, 1):
        found = []
        for factor, there in ((1.0, 0.0), (2.0**16, 1.0)):
            toy, tasks = Toy(), open_tasks(method, NUM_TASKS, every=4)
            toy.unused = nn.Parameter(torch.zeros(2))
            toy.body.grad = torch.full_like(toy.body, there * factor)
            total = backward(
                tasks, toy, toy.losses(), step=step, scale=lambda loss, by=factor: loss * by
            )
            assert (total.shape, total.requires_grad) == ((), False)
            own = [p.grad for p in tasks.parameters()]
            body, head, unused = grads(toy)
            assert unused is None, "no loss uses it"
            scaled = [g / factor for g in (body - there * factor, head, *own)]
            found.append([scaled, total, [b.clone() for b in tasks.buffers()]])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["nashmtl", "pcgrad"])
def test_an_overflow_reaches_the_gradients_and_leaves_the_weights(method: str) -> None:
    toy, tasks = Toy(), open_tasks(method, NUM_TASKS, every=4)
    backward(tasks, toy, toy.losses(), scale=lambda loss: loss * math.inf)
    assert not all(g.isfinite().all() for g in grads(toy))
    if method == "nashmtl":
        assert tasks.alpha.tolist() == [1, 1, 1]


def vectors(k: int, seed: int, *, shared: float = 0.0, size: int = 30) -> Tensor:
    """k random gradients of very different lengths, (k, size); `shared` pulls them together."""
    generator = seeded(seed)
    own = torch.randn(k, size, generator=generator, dtype=torch.float64)
    common = torch.randn(size, generator=generator, dtype=torch.float64)
    lengths = 10 ** (4 * torch.rand(k, 1, generator=generator, dtype=torch.float64) - 2)
    return lengths * (own + shared * common)


def published_update(gradients: Tensor, generator: torch.Generator) -> Tensor:
    """Algorithm 1 of Yu et al. 2020, word by word, on the gradients themselves."""
    total = torch.zeros_like(gradients[0])
    for i, gradient in enumerate(gradients):
        projected = gradient.clone()
        for j in torch.randperm(len(gradients), generator=generator).tolist():
            if i != j and projected @ gradients[j] < 0:
                other = gradients[j]
                projected = projected - (projected @ other) / other.norm() ** 2 * other
        total = total + projected
    return total


def test_the_gram_matrix_is_exact_in_float64_and_a_missing_gradient_counts_as_zeros() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        joined = vectors(2, 1, size=1000).to(dtype)
        exact = joined.double() @ joined.double().T
        torch.testing.assert_close(gram([[g] for g in joined]), exact, rtol=1e-12, atol=1e-12)
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    found = gram([[one, None, None], [None, two, None], [one, two, None]])
    assert found.tolist() == [[5, 0, 5], [0, 9, 9], [5, 9, 14]]
    assert gram([[None], [None]]).tolist() == [[0, 0], [0, 0]]


def test_nash_weights_solve_g_a_equal_1_over_a() -> None:
    for k, seed in [(k, seed) for k in (2, 3, 5, 10) for seed in range(20)]:
        gradients = vectors(k, seed, shared=seed / 10)
        products = gradients @ gradients.T
        a = nash_weights(products)
        assert a is not None
        assert (a > 0).all()
        residual = products / products.norm() @ a - 1 / a
        assert residual.abs().max() <= 1e-9


def test_nash_weights_of_two_tasks_have_a_closed_form() -> None:
    """C b = 1/b with b_1 = b_2 and the cosine rho: b^2 = 1 / (1 + rho)."""
    for rho in (-0.999999, -0.9, 0.0, 0.5, 1.0):
        products = torch.tensor([[4, 6 * rho], [6 * rho, 9]], dtype=torch.float64)
        b = (1 + rho) ** -0.5 * math.sqrt(products.norm())
        expected = torch.tensor([b / 2, b / 3], dtype=torch.float64)
        torch.testing.assert_close(nash_weights(products), expected, rtol=1e-8, atol=0)


def test_there_are_no_nash_weights_where_no_update_serves_all() -> None:
    for gradients in [
        [[1.0, 2.0], [-1.0, -2.0]],
        [[1.0, 2.0], [-3.0, -6.0]],
        [[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]],
        [[1.0, 2.0], [0.0, 0.0]],
        [[0.0, 0.0], [0.0, 0.0]],
        [[1.0, 2.0], [1e-12, 0.0]],
        [[1.0, 2.0], [math.inf, 0.0]],
        [[1.0, 2.0], [math.nan, 0.0]],
    ]:
        stacked = torch.tensor(gradients, dtype=torch.float64)
        assert nash_weights(stacked @ stacked.T) is None


def test_pcgrad_is_the_published_algorithm() -> None:
    conflicts = 0
    for k, seed in [(k, seed) for k in (2, 3, 6) for seed in range(20)]:
        gradients = vectors(k, seed)
        c = pcgrad_weights(gradients @ gradients.T, seeded(seed))
        conflicts += (c != 1).any().item()
        expected = published_update(gradients, seeded(seed))  # in the order of its generator
        torch.testing.assert_close(c @ gradients, expected, rtol=1e-9, atol=1e-9)
    assert conflicts >= 15


def test_pcgrad_without_conflict_is_the_plain_sum_and_of_two_has_a_closed_form() -> None:
    gradients = vectors(5, 0).abs()
    assert pcgrad_weights(gradients @ gradients.T, seeded(0)).tolist() == [1] * 5
    assert pcgrad_weights(torch.zeros(3, 3).double(), seeded(0)).tolist() == [1] * 3
    products = torch.tensor([[4, -3], [-3, 9]], dtype=torch.float64)
    # g_1 - (g_1 . g_2) / |g_2|^2 g_2 + g_2 - (g_1 . g_2) / |g_1|^2 g_1
    assert pcgrad_weights(products, seeded(0)).tolist() == [1 + 3 / 4, 1 + 3 / 9]
