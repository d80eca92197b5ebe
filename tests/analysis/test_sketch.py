"""Count sketches keep inner products: exactly for small models, without bias for large ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deme_cli.analysis.sketch import CountSketch, cosines, inner_products

SIZES = {"a.weight": 900, "a.bias": 7, "b.weight": 1300, "c": 1}
SEEDS, SIZE = 200, 128


def vector(seed: int, *, heavy: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(count, generator=generator) for name, count in SIZES.items()}
    if heavy:
        made["b.weight"][:3] *= 40
    return made


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat(list(tensors.values())).double().numpy()


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_inner_products_are_unbiased_and_within_their_variance(share: float, heavy: bool) -> None:
    a, other = vector(1, heavy=heavy), vector(2, heavy=heavy)
    b = {name: share * a[name] + (1 - share) * other[name] for name in SIZES}
    exact = flat(a) @ flat(b)
    found = []
    for seed in range(SEEDS):
        sketch = CountSketch(SIZES, SIZE, seed=seed)
        found.append(sketch(a.items()) @ sketch(b.items()))
    scale = np.linalg.norm(flat(a)) * np.linalg.norm(flat(b))
    bound = 2 * scale**2 / SIZE  # of the variance
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.sqrt(bound / SEEDS))
    assert np.var(found) < 1.3 * bound


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_cosines_are_within_their_standard_error(share: float) -> None:
    a, other = vector(3), vector(4)
    b = {name: share * a[name] + (1 - share) * other[name] for name in SIZES}
    exact = cosines(inner_products(np.stack([flat(a), flat(b)])))[0, 1]
    errors = []
    for seed in range(SEEDS):
        sketch = CountSketch(SIZES, SIZE, seed=seed)
        pair = np.stack([sketch(a.items()), sketch(b.items())])
        errors.append(cosines(inner_products(pair))[0, 1] - exact)
    assert np.sqrt(np.mean(np.square(errors))) < sketch.standard_error == np.sqrt(2 / SIZE)


def test_a_model_that_fits_is_kept_as_it_is() -> None:
    sketch = CountSketch(SIZES, sum(SIZES.values()))
    assert sketch.standard_error == 0
    assert np.array_equal(sketch(vector(1).items()), flat(vector(1)))


def test_tensors_are_hashed_by_name_and_add_up() -> None:
    sketch, a = CountSketch(SIZES, SIZE), vector(1)
    whole = sketch(a.items())
    assert np.array_equal(whole, CountSketch(SIZES, SIZE)(reversed(a.items())))
    parts = [sketch([(name, a[name]), ("c", None)]) for name in SIZES]
    assert np.allclose(whole, np.sum(parts, axis=0))
    assert not np.allclose(whole, CountSketch(SIZES, SIZE, seed=1)(a.items()))


def test_inner_products_are_those_of_the_whole_and_nothing_is_like_zero() -> None:
    sketches = np.random.default_rng(0).normal(size=(3, 9001)).astype(np.float32)
    sketches[2] = 0
    wide = sketches.astype(np.float64)
    assert np.allclose(inner_products(sketches), wide @ wide.T)
    table = cosines(inner_products(sketches))
    assert table[0, 0] == pytest.approx(1)
    assert not table[2].any()
