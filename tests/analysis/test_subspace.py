"""Planes and lines of weights: orthonormal, through their models, and random filter by filter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deme_cli.analysis.landscape.directions import basis_of, cosine, random_direction
from deme_cli.analysis.landscape.subspace import (
    Model,
    Weights,
    inner_products,
    mixed_directions,
    open_models,
    open_origin,
    subspace_of,
)
from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.diffusion.projection import attach_projections
from deme_cli.errors import ArtifactError, NumericsError


@pytest.fixture
def models(finished_run: Path) -> list[Model]:
    """Base and four experts."""
    names = ["base", *(f"ft_{index}of4" for index in range(1, 5))]
    return open_models([str(finished_run / f"{name}.safetensors") for name in names])


def flat(weights: Weights) -> np.ndarray:
    return torch.cat([weights[name].flatten() for name in sorted(weights)]).double().numpy()


def differences(models: list[Model]) -> np.ndarray:
    origin, *others = (flat(model.weights) for model in models)
    return np.array([other - origin for other in others])


def directions_of(models: list[Model], mixing: np.ndarray) -> np.ndarray:
    network = open_origin(models[0].argument, with_projections=False, device="cpu").network
    arguments = [model.argument for model in models[1:]]
    return np.array([flat(one) for one in mixed_directions(network, arguments, mixing)])


def write_changed(path: Path, source: Path, **changes: Tensor) -> str:
    """A model with some tensors of another put in or, where None, left out."""
    weights = {**load_tensors(source), **changes}
    kept = {name: theta for name, theta in weights.items() if theta is not None}
    write_artifact(path, kept, read_record(source))
    return str(path)


@pytest.mark.parametrize("along", ["vectors", "pca"])
def test_the_basis_is_orthonormal_and_sees_the_models(models: list[Model], along: str) -> None:
    count = 3 if along == "vectors" else 4
    basis = basis_of(along, models, count)
    tau, directions = differences(models), directions_of(models, basis.mixing)
    assert directions @ directions.T == pytest.approx(np.eye(2), abs=1e-5)
    places = tau @ directions.T
    assert basis.coordinates == pytest.approx(places, abs=1e-5)
    distances = np.linalg.norm(tau - places @ directions, axis=1)
    assert basis.distances == pytest.approx(distances, abs=1e-4)
    among = tau[: count - 1]
    shares = (places[: count - 1] ** 2).sum(axis=0) / (among**2).sum()
    assert basis.shares == pytest.approx(shares, rel=1e-5)
    if along == "vectors":
        assert basis.distances[:2] == pytest.approx([0, 0], abs=1e-6)
        assert basis.coordinates[0, 1] == pytest.approx(0, abs=1e-9)
        assert directions[0] == pytest.approx(tau[0] / np.linalg.norm(tau[0]), abs=1e-6)
    else:
        values = np.linalg.svd(among, compute_uv=False) ** 2
        assert basis.shares == pytest.approx(values[:2] / values.sum(), rel=1e-5)


def test_a_random_direction_has_filters_as_long_as_the_models(models: list[Model]) -> None:
    weights = models[0].weights
    direction = random_direction(weights, 0, 0)
    assert set(direction) == {name for name, theta in weights.items() if theta.ndim >= 2}
    for name, drawn in direction.items():
        own, theta = drawn.flatten(1).norm(dim=1), weights[name].flatten(1).norm(dim=1)
        assert torch.allclose(own, theta, rtol=1e-5)
    turned = random_direction(dict(reversed(weights.items())), 0, 0)
    assert all(torch.equal(turned[name], drawn) for name, drawn in direction.items())
    other = random_direction(weights, 0, 1)
    assert cosine(direction, direction) == pytest.approx(1)
    assert abs(cosine(direction, other)) < 0.2
    name = "conv_in.weight"
    assert not torch.equal(random_direction(weights, 1, 0)[name], direction[name])


def test_at_zero_the_weights_are_the_origins_bit_for_bit(models: list[Model]) -> None:
    network = open_origin(models[0].argument, with_projections=False, device="cpu").network
    subspace = subspace_of(network, [random_direction(network.state_dict(), 0, i) for i in (0, 1)])
    subspace.put(network, (0.3, -0.2))
    own, theta = network.state_dict(), models[0].weights
    first, second = subspace.directions
    for name, value in own.items():
        moved = 0.3 * first[name] - 0.2 * second[name] if name in first else 0
        assert torch.allclose(value, theta[name] + moved, atol=1e-6)
    subspace.put(network, (0.0, 0.0))
    assert all(torch.equal(own[name], theta[name]) for name in theta)


def test_projections_that_some_lack_are_the_identity_there(
    finished_run: Path, tmp_path: Path
) -> None:
    base, expert = (finished_run / f"{name}.safetensors" for name in ("base", "ft_1of4"))
    network = open_origin(str(base), with_projections=False, device="cpu").network
    attach_projections(network, "block")
    generator = torch.Generator().manual_seed(0)
    projections = {
        name: theta + 0.1 * torch.randn(theta.shape, generator=generator)
        for name, theta in network.state_dict().items()
        if name.startswith("channel_projection.")
    }
    block = write_changed(tmp_path / "block.safetensors", expert, **projections)
    models = open_models([str(base), block])
    square = inner_products(models)[0, 0]
    plain = inner_products(open_models([str(base), str(expert)]))[0, 0]
    turned = sum(float((p - torch.eye(len(p))).square().sum()) for p in projections.values())
    assert square == pytest.approx(plain + turned, rel=1e-6)
    origin = open_origin(str(base), with_projections=True, device="cpu").network
    (direction,) = mixed_directions(origin, [block], np.ones((1, 1)))
    for name, projection in projections.items():
        assert torch.allclose(direction[name], projection - torch.eye(len(projection)))
    reversed_models = open_models([block, str(base)])
    assert inner_products(reversed_models)[0, 0] == pytest.approx(square)


def test_models_that_span_nothing_or_do_not_fit_are_told(
    finished_run: Path, tmp_path: Path
) -> None:
    base, expert, other = (
        finished_run / f"{name}.safetensors" for name in ("base", "ft_1of4", "ft_2of4")
    )
    theta, moved = load_tensors(base), load_tensors(expert)
    doubled = {name: 2 * moved[name] - theta[name] for name in theta}
    twice = write_changed(tmp_path / "twice.safetensors", expert, **doubled)
    models = open_models([str(base), str(expert), twice])
    with pytest.raises(ArtifactError, match="ft_1of4 and twice span no plane: their cosine is 1"):
        basis_of("vectors", models, 3)
    with pytest.raises(ArtifactError, match="ft_1of4, twice lie on one line through base"):
        basis_of("pca", models, 3)
    same = write_changed(tmp_path / "same.safetensors", base)
    with pytest.raises(ArtifactError, match="same has the weights of base, so there is no"):
        basis_of("line", open_models([str(base), same]), 2)
    broken = write_changed(
        tmp_path / "inf.safetensors", expert, **{"conv_in.bias": torch.full((8,), torch.inf)}
    )
    with pytest.raises(NumericsError, match=r"inf.safetensors: its weights, or those of .*base"):
        basis_of("line", open_models([str(base), broken]), 2)
    wide = write_changed(tmp_path / "wide.safetensors", other, **{"conv_in.bias": torch.zeros(9)})
    with pytest.raises(ArtifactError, match=r"'conv_in.bias' has shape \[9\], .*base.*has \[8\]"):
        open_models([str(base), wide])
    lacking = write_changed(tmp_path / "lacks.safetensors", other, **{"conv_in.bias": None})
    with pytest.raises(ArtifactError, match=r"lacks.safetensors: lacks 'conv_in.bias', which"):
        open_models([str(base), lacking])
