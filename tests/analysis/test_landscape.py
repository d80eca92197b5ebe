"""Landscapes of loss: those of a plain loop over the draws, on planes that hold their models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deme_cli.analysis.draws import estimate
from deme_cli.analysis.landscape import analyze_landscape, axes_of, held_out_loss
from deme_cli.analysis.landscape_picture import contour_levels
from deme_cli.analysis.plane import (
    Plane,
    Weights,
    WeightsOf,
    cosine,
    inner_products,
    mixed_directions,
    open_origin,
    random_direction,
    read_models,
    vectors_basis,
)
from deme_cli.analysis.result import Analysis
from deme_cli.analysis.settings import LandscapeConfig
from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import DataConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import assemble, load_denoiser, predict
from deme_cli.diffusion.projection import attach_projections
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.training.examples import PixelExamples

BASE, *EXPERTS = (f"{name}.safetensors" for name in ("base", *(f"ft_{i}of4" for i in range(1, 5))))


def settings(**options: Any) -> LandscapeConfig:
    return LandscapeConfig(**{"points": 3, "num": 12, "report_num": 16, "batch_size": 5} | options)


def analyze(*models: str, **options: Any) -> Analysis:
    usual = {"settings": settings(), "images": DataConfig(source="digits"), "num_ranges": 2}
    return analyze_landscape(models, **{**usual, **options})


def losses_of(weights: Weights, *, fresh: bool) -> np.ndarray:
    """The loss of all timesteps and of both ranges, one draw after the other."""
    denoiser = load_denoiser(Path(BASE))
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape))
    network, schedule = assemble(denoiser.record, weights, "here").network, denoiser.schedule
    draws = held_out_loss(examples, schedule, settings(), fresh=fresh).draws
    errors = []
    for i in range(len(draws.t)):
        x0, _ = examples.draw([int(draws.images[i])], flip=None, generator=None)
        eps, t = draws.noise(torch.tensor([i])), draws.t[i : i + 1]
        with torch.no_grad():
            output = predict(network, schedule.add_noise(x0, eps, t), t)
        errors.append((output - eps).square().double().mean().item())
    own, early = np.array(errors), (draws.t < 50).numpy()
    return np.array([own.mean(), own[early].mean(), own[~early].mean()])


def test_points_and_models_are_those_of_a_loop_over_the_draws(
    run_folder: Path, resumed: Any
) -> None:
    call = partial(analyze, BASE, *EXPERTS[:2], marks=[EXPERTS[2]])
    whole = call(output=Path("whole.json")).document
    document = resumed(call, 11).document  # 8 probes, then points
    assert document == whole
    models = read_models([BASE, *EXPERTS[:3]])
    x, y = (axis["values"] for axis in document["axes"])
    shares = np.array([x[2], y[0]]) @ vectors_basis(models).mixing
    origin, *others = (model.weights for model in models)
    weights = {
        name: theta + sum(c * (o[name] - theta) for c, o in zip(shares, others, strict=True))
        for name, theta in origin.items()
    }
    grid = np.array([row["loss"] for row in document["losses"]])  # (G, points, points)
    assert grid.shape == (3, 3, 3)
    assert grid[:, 2, 0] == pytest.approx(losses_of(weights, fresh=False), rel=1e-5)
    fresh = losses_of(origin, fresh=True)
    assert [row["loss"] for row in document["origin"]] == pytest.approx(fresh, rel=1e-6)
    for row, model in zip(document["models"], models, strict=True):
        own = losses_of(model.weights, fresh=True)
        assert row["losses"] == pytest.approx(own, rel=1e-5)
        assert row["percent"] == pytest.approx(100 * (own / fresh - 1), abs=1e-3)
    other = analyze(BASE, *EXPERTS[:2], settings=settings(batch_size=64), output=Path("64.json"))
    near = np.array([row["loss"] for row in other.document["losses"]])
    place = vectors_basis(read_models([BASE, *EXPERTS[:2]])).coordinates[1]
    assert other.document["models"][2]["coordinates"] == pytest.approx(place)
    zeros = [np.flatnonzero(np.array(axis["values"]) == 0)[0] for axis in other.document["axes"]]
    assert near[:, zeros[0], zeros[1]] == pytest.approx(losses_of(origin, fresh=False), rel=1e-5)


def test_slopes_and_lowest_points_are_told_by_fresh_draws(run_folder: Path) -> None:
    document = analyze(BASE, settings=settings(span=0.004)).document
    denoiser = load_denoiser(Path(BASE))
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape))
    network = denoiser.network
    draws = held_out_loss(examples, denoiser.schedule, settings(), fresh=True).draws
    directions = [random_direction(network.state_dict(), 0, i) for i in (0, 1)]
    loss = draws.loss_and_gradient(network, lambda *_: None)
    gradients = {name: own.grad for name, own in network.named_parameters()}
    slopes = [sum(float((gradients[n] * d[n]).sum()) for n in d) for d in directions]
    assert document["origin"][0]["slope"] == pytest.approx(slopes, rel=1e-2)
    steepness = 100 * np.linalg.norm(slopes) / loss
    assert document["origin"][0]["slope_percent"] == pytest.approx(steepness, rel=1e-2)
    wide = analyze(BASE, settings=settings(span=0.3), force=True).document
    row, grid = wide["lowest"][2], np.array(wide["losses"][2]["loss"])
    assert row["loss"] == grid.min()
    plane, errors = Plane(network, directions), []
    for place in ((0.0, 0.0), row["coordinates"]):
        plane.put(place)
        errors.append(draws.errors(network).numpy())
    inside = (draws.t >= 50).numpy()
    differences = (errors[1] - errors[0])[inside]
    assert row["difference"] == pytest.approx(differences.mean(), rel=1e-9)
    half = estimate(differences, draws.images.numpy()[inside]).half
    assert row["interval"] == pytest.approx(half, rel=1e-9)
    assert row["percent"] == pytest.approx(100 * differences.mean() / errors[0][inside].mean())


def write_changed(path: str, source: str, scale: float = 1.0, **changes: Any) -> str:
    """A model with all weights times `scale`, some put in or, where None, left out."""
    weights = {name: scale * theta for name, theta in load_tensors(Path(source)).items()} | changes
    kept = {name: theta for name, theta in weights.items() if theta is not None}
    write_artifact(Path(path), kept, read_record(Path(source)))
    return path


def test_a_point_that_is_not_finite_is_left_blank(run_folder: Path) -> None:
    far = write_changed("far.safetensors", EXPERTS[1], 1e25)
    made = analyze(BASE, EXPERTS[0], far)
    assert [row[2] for row in made.document["losses"][0]["loss"]] == [None] * 3
    assert b"grey: not finite" in made.pictures[1].read_bytes()
    broken = write_changed("far.safetensors", BASE, 1e25)
    with pytest.raises(NumericsError, match=r"far.safetensors: the loss of timesteps 0:100 is not"):
        analyze(broken, output=Path("broken.json"))
    with pytest.raises(ConfigError, match=r"0:50 have 1 of 2 draws; raise --num"):
        analyze(BASE, settings=settings(num=2), output=Path("few.json"))


def test_axes_hold_the_origin_and_all_models() -> None:
    places = np.array([[1.0, 0.0], [-0.1, 1.2]])
    for points in (3, 4, 15, 21):
        for axis, low, high in zip(
            axes_of(places, settings(points=points)), (-0.1, 0.0), (1.0, 1.2), strict=True
        ):
            assert len(axis) == points
            assert (axis == 0).sum() == 1
            assert axis[0] < low
            assert axis[-1] > high
            assert np.allclose(np.diff(axis), axis[1] - axis[0])
    assert axes_of(None, settings(points=5, span=2))[0] == pytest.approx([-2, -1, 0, 1, 2])


def test_contour_levels_are_symmetric_and_show_what_is_better() -> None:
    percent = np.array([[[0.0, -0.5], [20.0, 90.0]], [[0.0, 1.0], [2.0, np.nan]]])
    levels = contour_levels(percent)
    assert levels == pytest.approx(-levels[::-1])
    assert 0.1 < min(levels[levels > 0]) <= 0.25
    assert max(levels) >= 50
    assert 0 in contour_levels(np.zeros((1, 2, 2)))


def flat(weights: Weights) -> np.ndarray:
    return torch.cat([weights[name].flatten() for name in sorted(weights)]).double().numpy()


def directions_of(models: list[WeightsOf], mixing: np.ndarray) -> np.ndarray:
    network = open_origin(models[0], device="cpu").network
    return np.array([flat(one) for one in mixed_directions(network, models[1:], mixing)])


def test_the_basis_is_orthonormal_and_sees_the_models(run_folder: Path) -> None:
    models = read_models([BASE, *EXPERTS])
    basis = vectors_basis(models)
    origin, *others = (flat(model.weights) for model in models)
    tau, directions = np.array(others) - origin, directions_of(models, basis.mixing)
    assert directions @ directions.T == pytest.approx(np.eye(2), abs=1e-5)
    places = tau @ directions.T
    assert basis.coordinates == pytest.approx(places, abs=1e-5)
    distances = np.linalg.norm(tau - places @ directions, axis=1)
    assert basis.distances == pytest.approx(distances, abs=1e-4)
    shares = (places[:2] ** 2).sum(axis=0) / (tau[:2] ** 2).sum()
    assert basis.shares == pytest.approx(shares, rel=1e-5)
    assert basis.distances[:2] == pytest.approx([0, 0], abs=1e-6)
    assert basis.coordinates[0, 1] == pytest.approx(0, abs=1e-9)
    assert directions[0] == pytest.approx(tau[0] / np.linalg.norm(tau[0]), abs=1e-6)


def test_random_directions_have_filters_as_long_as_the_models(run_folder: Path) -> None:
    (model,) = read_models([BASE])
    theta, network = model.weights, open_origin(model, device="cpu").network
    first, second = (random_direction(theta, 0, axis) for axis in (0, 1))
    assert set(first) == {name for name, one in theta.items() if one.ndim >= 2}
    for name, drawn in first.items():
        own, expected = drawn.flatten(1).norm(dim=1), theta[name].flatten(1).norm(dim=1)
        assert torch.allclose(own, expected, rtol=1e-5)
    turned = random_direction(dict(reversed(theta.items())), 0, 0)
    assert all(torch.equal(turned[name], drawn) for name, drawn in first.items())
    assert cosine(first, first) == pytest.approx(1)
    assert abs(cosine(first, second)) < 0.2
    other = random_direction(theta, 1, 0)["conv_in.weight"]
    assert not torch.equal(other, first["conv_in.weight"])
    plane, own = Plane(network, [first, second]), network.state_dict()
    plane.put((0.3, -0.2))
    for name, value in own.items():
        moved = 0.3 * first[name] - 0.2 * second[name] if name in first else 0
        assert torch.allclose(value, theta[name] + moved, atol=1e-6)
    plane.put((0.0, 0.0))
    assert all(torch.equal(own[name], theta[name]) for name in theta)


def test_projections_that_some_lack_are_the_identity_there(run_folder: Path) -> None:
    (model,) = read_models([BASE])
    network = open_origin(model, device="cpu").network
    attach_projections(network, "block")
    generator = torch.Generator().manual_seed(0)
    projections = {
        name: theta + 0.1 * torch.randn(theta.shape, generator=generator)
        for name, theta in network.state_dict().items()
        if name.startswith("channel_projection.")
    }
    block = write_changed("block.safetensors", EXPERTS[0], **projections)
    models = read_models([BASE, block])
    square = inner_products(models)[0, 0]
    plain = inner_products(read_models([BASE, EXPERTS[0]]))[0, 0]
    turned = sum(float((p - torch.eye(len(p))).square().sum()) for p in projections.values())
    assert square == pytest.approx(plain + turned, rel=1e-6)
    origin = open_origin(models[0], device="cpu").network
    (direction,) = mixed_directions(origin, models[1:], np.ones((1, 1)))
    for name, projection in projections.items():
        assert torch.allclose(direction[name], projection - torch.eye(len(projection)))
    assert inner_products(read_models([block, BASE]))[0, 0] == pytest.approx(square)


def test_models_that_span_nothing_or_do_not_fit_are_told(run_folder: Path) -> None:
    first, other = EXPERTS[:2]
    theta, moved = load_tensors(Path(BASE)), load_tensors(Path(first))
    doubled = {name: 2 * moved[name] - theta[name] for name in theta}
    infinite, wide = torch.full((8,), torch.inf), torch.zeros(9)
    for third, error, message in (
        (write_changed("twice.safetensors", first, **doubled), ArtifactError,
         "ft_1of4 and twice span no plane: their cosine is 1"),
        (write_changed("same.safetensors", BASE), ArtifactError,
         "same has the weights of base, so there is no"),
        (write_changed("inf.safetensors", first, **{"conv_in.bias": infinite}), NumericsError,
         r"inf.safetensors: its weights, or those of .*base"),
        (write_changed("wide.safetensors", other, **{"conv_in.bias": wide}), ArtifactError,
         r"'conv_in.bias' has shape \[9\], .*base.*has \[8\]"),
        (write_changed("lacks.safetensors", other, **{"conv_in.bias": None}), ArtifactError,
         r"lacks.safetensors: lacks 'conv_in.bias', which"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            vectors_basis(read_models([BASE, first, third]))
