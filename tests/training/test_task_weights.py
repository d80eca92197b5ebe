from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deme_cli.training.multitask import gram, nash_weights, pcgrad_weights


def vectors(k: int, seed: int, *, shared: float = 0.0, size: int = 30) -> Tensor:
    """k random gradients of very different lengths, (k, size); `shared` pulls them together."""
    generator = torch.Generator().manual_seed(seed)
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


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_gram_matrix_holds_the_inner_products_of_the_joined_tensors() -> None:
    joined = vectors(3, 0)
    parts = [[g[:10].view(2, 5), g[10:11].view(()), g[11:]] for g in joined]
    torch.testing.assert_close(gram(parts), joined @ joined.T, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gram_matrix_is_exact_in_float64_for_smaller_dtypes(dtype: torch.dtype) -> None:
    joined = vectors(2, 1, size=1000).to(dtype)
    exact = joined.double() @ joined.double().T
    torch.testing.assert_close(gram([[g] for g in joined]), exact, rtol=1e-12, atol=1e-12)


def test_a_missing_gradient_counts_as_zeros() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    found = gram([[one, None, None], [None, two, None], [one, two, None]])
    assert found.tolist() == [[5, 0, 5], [0, 9, 9], [5, 9, 14]]
    assert gram([[None], [None]]).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("k", range(2, 11))
def test_nash_weights_solve_g_a_equal_1_over_a(k: int) -> None:
    for seed in range(20):
        gradients = vectors(k, seed, shared=seed / 10)
        products = gradients @ gradients.T
        a = nash_weights(products)
        assert a is not None
        assert (a > 0).all()
        residual = products / products.norm() @ a - 1 / a
        assert residual.abs().max() <= 1e-9


def test_nash_weights_of_orthogonal_gradients_are_the_inverse_lengths() -> None:
    squares = torch.tensor([1e-4, 1.0, 25.0, 1e4], dtype=torch.float64)
    expected = (squares / squares.norm()) ** -0.5
    torch.testing.assert_close(nash_weights(torch.diag(squares)), expected, rtol=1e-12, atol=0)


def test_nash_weights_of_two_tasks_have_a_closed_form() -> None:
    """C b = 1/b with b_1 = b_2 and the cosine rho: b^2 = 1 / (1 + rho)."""
    for rho in (-0.999999, -0.9, 0.0, 0.5, 1.0):
        products = torch.tensor([[4, 6 * rho], [6 * rho, 9]], dtype=torch.float64)
        b = (1 + rho) ** -0.5 * math.sqrt(products.norm())
        expected = torch.tensor([b / 2, b / 3], dtype=torch.float64)
        torch.testing.assert_close(nash_weights(products), expected, rtol=1e-8, atol=0)


def test_nash_weights_do_not_depend_on_a_common_scale() -> None:
    products = vectors(5, 3) @ vectors(5, 3).T
    for scale in (1e-12, 2.0**32, 1e20):
        torch.testing.assert_close(nash_weights(scale * products), nash_weights(products))


def test_the_nash_update_serves_every_task_alike() -> None:
    """By Navon et al. a_i g_i . update = 1 for all i, for the normalised G."""
    gradients = vectors(6, 4)
    a = nash_weights(gradients @ gradients.T)
    gains = a * (gradients @ (a @ gradients)) / (gradients @ gradients.T).norm()
    torch.testing.assert_close(gains, torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize(
    "gradients",
    [
        [[1.0, 2.0], [-1.0, -2.0]],
        [[1.0, 2.0], [-3.0, -6.0]],
        [[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]],
        [[1.0, 2.0], [0.0, 0.0]],
        [[0.0, 0.0], [0.0, 0.0]],
        [[1.0, 2.0], [1e-12, 0.0]],
        [[1.0, 2.0], [math.inf, 0.0]],
        [[1.0, 2.0], [math.nan, 0.0]],
    ],
    ids=["opposed", "opposed-unequal", "balanced", "zero", "zeros", "tiny", "infinite", "nan"],
)
def test_there_are_no_nash_weights_where_no_update_serves_all(gradients: list) -> None:
    stacked = torch.tensor(gradients, dtype=torch.float64)
    assert nash_weights(stacked @ stacked.T) is None


def test_opposition_up_to_float32_rounding_has_no_nash_weights() -> None:
    gradient = vectors(1, 5, size=10_000)[0].float()
    opposed = (gradient / 3) * -3
    assert not torch.equal(opposed, -gradient)
    assert nash_weights(gram([[gradient], [opposed]])) is None


@pytest.mark.parametrize("k", range(2, 7))
def test_pcgrad_is_the_published_algorithm(k: int) -> None:
    conflicts = 0
    for seed in range(20):
        gradients = vectors(k, seed)
        c = pcgrad_weights(gradients @ gradients.T, seeded(seed))
        conflicts += (c != 1).any().item()
        expected = published_update(gradients, seeded(seed))
        torch.testing.assert_close(c @ gradients, expected, rtol=1e-9, atol=1e-9)
    assert conflicts >= 5


def test_pcgrad_of_two_tasks_opposes_neither() -> None:
    for seed in range(20):
        gradients = vectors(2, seed)
        update = pcgrad_weights(gradients @ gradients.T, seeded(0)) @ gradients
        assert (gradients @ update >= 0).all()


def test_pcgrad_of_two_tasks_has_a_closed_form() -> None:
    """g_1 - (g_1 . g_2 / |g_2|^2) g_2 and the other way round."""
    c = pcgrad_weights(torch.tensor([[4.0, -1.0], [-1.0, 8.0]]).double(), seeded(0))
    assert c.tolist() == [1 + 1 / 4, 1 + 1 / 8]


def test_pcgrad_without_conflict_is_the_plain_sum() -> None:
    gradients = vectors(5, 0).abs()
    assert pcgrad_weights(gradients @ gradients.T, seeded(0)).tolist() == [1] * 5
    assert pcgrad_weights(torch.zeros(3, 3).double(), seeded(0)).tolist() == [1] * 3


def test_pcgrad_follows_its_generator() -> None:
    products = vectors(6, 2) @ vectors(6, 2).T
    first, again, other = (pcgrad_weights(products, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
