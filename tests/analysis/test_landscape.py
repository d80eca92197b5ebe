"""Landscapes of loss: those of a plain loop over the draws, on planes that hold their models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deme_cli.analysis.draws import estimate, open_models, spread_draws
from deme_cli.analysis.landscape import (
    Plane,
    analyze_landscape,
    axes_of,
    contour_levels,
    dot,
    random_direction,
    seen_on,
    spanned,
    task_vector,
)
from deme_cli.analysis.result import Analysis
from deme_cli.analysis.settings import LandscapeConfig
from deme_cli.artifacts import load_tensors
from deme_cli.config import DataConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import assemble, load_denoiser, predict
from deme_cli.diffusion.projection import PREFIX, attach_projections
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.timesteps import TimestepRange
from deme_cli.training.batches import FixedDraws
from deme_cli.training.examples import PixelExamples

BASE, *EXPERTS = (f"{name}.safetensors" for name in ("base", *(f"ft_{i}of4" for i in range(1, 5))))
Weights = dict[str, torch.Tensor]


def settings(**options: Any) -> LandscapeConfig:
    return LandscapeConfig(**{"points": 3, "num": 8, "report_num": 8, "batch_size": 5} | options)


def analyze(*models: str | Path, **options: Any) -> Analysis:
    usual = {"settings": settings(), "images": DataConfig(source="digits"), "num_ranges": 2}
    return analyze_landscape(models, **{**usual, **options})


def draws_of(*, fresh: bool) -> FixedDraws:
    denoiser = load_denoiser(Path(BASE))
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape))
    config = settings(seed=1) if fresh else settings()
    return spread_draws(examples, denoiser.schedule, [TimestepRange(0, 100)], config)


def errors_of(weights: Weights, draws: FixedDraws) -> np.ndarray:
    """One draw after the other."""
    network, errors = assemble(load_denoiser(Path(BASE)).record, weights, "here").network, []
    for i in range(len(draws.t)):
        x0, _ = draws.examples.draw([int(draws.images[i])], flip=None, generator=None)
        eps, t = draws.noise(torch.tensor([i])), draws.t[i : i + 1]
        with torch.no_grad():
            output = predict(network, draws.schedule.add_noise(x0, eps, t), t)
        errors.append((output - eps).square().double().mean().item())
    return np.array(errors)


def losses_of(weights: Weights, *, fresh: bool) -> np.ndarray:
    """The loss of all timesteps and of both ranges."""
    draws = draws_of(fresh=fresh)
    own, early = errors_of(weights, draws), (draws.t < 50).numpy()
    return np.array([own.mean(), own[early].mean(), own[~early].mean()])


def test_points_and_models_are_those_of_a_loop_over_the_draws(
    run_folder: Path, resumed: Any
) -> None:
    document = resumed(partial(analyze, BASE, *EXPERTS[:2], marks=[EXPERTS[2]]), 6).document
    x, y = (axis["values"] for axis in document["axes"])
    models = [load_tensors(Path(path)) for path in (BASE, *EXPERTS[:3])]
    origin, *others = models
    vectors = [task_vector(origin, other) for other in others]
    directions = spanned(*vectors[:2], "abc")
    weights = {
        name: theta + x[2] * directions[0][name] + y[0] * directions[1][name]
        for name, theta in origin.items()
    }
    grid = np.array(document["losses"])  # (G, points, points)
    assert grid.shape == (3, 3, 3)
    assert grid[:, 2, 0] == pytest.approx(losses_of(weights, fresh=False), rel=1e-5)
    zeros = [values.index(0) for values in (x, y)]
    assert grid[:, zeros[0], zeros[1]] == pytest.approx(losses_of(origin, fresh=False), rel=1e-5)
    fresh = losses_of(origin, fresh=True)
    assert [row["loss"] for row in document["groups"]] == pytest.approx(fresh, rel=1e-5)
    for row, model in zip(document["models"], models, strict=True):
        own = losses_of(model, fresh=True)
        assert row["losses"] == pytest.approx(own, rel=1e-5)
        assert row["percent"] == pytest.approx(100 * (own / fresh - 1), abs=1e-3)
    for row, tau in zip(document["models"][1:], vectors, strict=True):
        place = [dot(direction, tau) for direction in directions]
        assert row["coordinates"] == pytest.approx(place)
    assert document["models"][2]["distance_from_landscape"] == 0
    assert document["models"][3]["distance_from_landscape"] > 0


def test_lowest_points_are_told_by_fresh_draws_on_a_random_plane(run_folder: Path) -> None:
    document = analyze(BASE, settings=settings(span=0.3)).document
    row, grid = document["groups"][2], np.array(document["losses"][2])
    axes = zip(document["axes"], row["lowest"], strict=True)
    assert grid[*(axis["values"].index(c) for axis, c in axes)] == grid.min()
    theta, draws = load_tensors(Path(BASE)), draws_of(fresh=True)
    directions = [random_direction(theta, 0, axis) for axis in (0, 1)]
    moved = dict(theta)
    for c, direction in zip(row["lowest"], directions, strict=True):
        moved |= {name: moved[name] + c * one for name, one in direction.items()}
    inside = (draws.t >= 50).numpy()
    first, errors = (errors_of(weights, draws)[inside] for weights in (theta, moved))
    mean, half = estimate(errors - first, draws.images.numpy()[inside])
    scale = 100 / first.mean()
    assert row["percent"] == pytest.approx(scale * mean, rel=1e-3)
    assert row["percent_interval"] == pytest.approx(scale * half, rel=1e-3)


def test_a_point_that_is_not_finite_is_left_blank(
    run_folder: Path, write_changed: Callable[..., Path]
) -> None:
    far = write_changed("far.safetensors", EXPERTS[1], 1e25)
    made = analyze(BASE, EXPERTS[0], far)
    assert [row[2] for row in made.document["losses"][0]] == [None] * 3
    broken = write_changed("far.safetensors", BASE, 1e25)
    with pytest.raises(NumericsError, match=r"far.safetensors: the loss of timesteps 0:100 is not"):
        analyze(broken, output=Path("broken.json"))
    with pytest.raises(ConfigError, match=r"0:50 have 1 of 2 draws; raise --num"):
        analyze(BASE, settings=settings(num=2), output=Path("few.json"))


def test_axes_hold_the_origin_and_all_models() -> None:
    places = [(0.0, 0.0), (1.0, 0.0), (-0.1, 1.2)]
    for points in (3, 4, 15, 21):
        x, y = axes_of(places, settings(points=points))
        for axis, low, high in ((x, -0.1, 1.0), (y, 0.0, 1.2)):
            assert (len(axis), (axis == 0).sum()) == (points, 1)
            assert axis[0] < low < high < axis[-1]
            assert np.allclose(np.diff(axis), axis[1] - axis[0])
    wide = axes_of(places[:1], settings(points=5, span=2))
    assert np.allclose(wide, [[-2, -1, 0, 1, 2]] * 2)


def test_contour_levels_are_symmetric_and_show_what_is_better() -> None:
    percent = np.array([[[0.0, -0.5], [20.0, 90.0]], [[0.0, 1.0], [2.0, np.nan]]])
    levels = contour_levels(percent)
    assert levels == pytest.approx(-levels[::-1])
    assert min(levels[levels > 0]) < 0.5
    assert max(levels) >= 50
    assert 0 in contour_levels(np.zeros((1, 2, 2)))


def test_the_basis_is_orthonormal_and_sees_the_models(run_folder: Path) -> None:
    origin, *others = (load_tensors(Path(path)) for path in (BASE, *EXPERTS))
    vectors = [task_vector(origin, other) for other in others]
    basis = spanned(*vectors[:2], "abc")
    flat = [torch.cat([v[n].flatten() for n in v]).double().numpy() for v in (*vectors, *basis)]
    tau, directions = np.array(flat[:4]), np.array(flat[4:])
    assert directions @ directions.T == pytest.approx(np.eye(2), abs=1e-5)
    assert directions[0] == pytest.approx(tau[0] / np.linalg.norm(tau[0]), abs=1e-6)
    places = tau @ directions.T
    distances = np.linalg.norm(tau - places @ directions, axis=1)
    assert distances[:2] == pytest.approx([0, 0], abs=1e-5)
    for vector, place, distance in zip(vectors, places, distances, strict=True):
        coordinates, off = seen_on(basis, vector)
        assert coordinates == pytest.approx(place, abs=1e-5)
        assert off == pytest.approx(distance, abs=1e-4)


def test_random_directions_have_filters_as_long_as_the_models(finished_run: Path) -> None:
    network = load_denoiser(finished_run / BASE).network
    theta = {name: one.clone() for name, one in network.state_dict().items()}
    first, second = (random_direction(theta, 0, axis) for axis in (0, 1))
    assert set(first) == {name for name, one in theta.items() if one.ndim >= 2}
    for name, drawn in first.items():
        own, expected = drawn.flatten(1).norm(dim=1), theta[name].flatten(1).norm(dim=1)
        assert torch.allclose(own, expected, rtol=1e-5)
    turned = random_direction(dict(reversed(theta.items())), 0, 0)
    assert all(torch.equal(turned[name], drawn) for name, drawn in first.items())
    assert abs(dot(first, second)) < 0.2 * (dot(first, first) * dot(second, second)) ** 0.5
    other = random_direction(theta, 1, 0)["conv_in.weight"]
    assert not torch.equal(other, first["conv_in.weight"])
    plane, own = Plane(network, [first, second]), network.state_dict()
    plane.put((0.3, -0.2))
    for name, value in own.items():
        moved = 0.3 * first[name] - 0.2 * second[name] if name in first else 0
        assert torch.allclose(value, theta[name] + moved, atol=1e-6)
    plane.put((0.0, 0.0))
    assert all(torch.equal(own[name], theta[name]) for name in theta)


def test_projections_that_some_lack_are_the_identity_there(
    run_folder: Path, write_changed: Callable[..., Path]
) -> None:
    network = load_denoiser(Path(BASE)).network
    attach_projections(network, "block")
    own = {n: theta for n, theta in network.state_dict().items() if n.startswith(PREFIX)}
    projections = {name: theta + 0.1 * torch.rand_like(theta) for name, theta in own.items()}
    block = str(write_changed("block.safetensors", EXPERTS[0], **projections))
    for order, sign in (([BASE, block], 1), ([block, BASE], -1)):
        origin, other = (one.network.state_dict() for one in open_models(order, pipeline=None))
        tau = task_vector(origin, other)
        for name, projection in projections.items():
            assert torch.allclose(tau[name], sign * (projection - torch.eye(len(projection))))


def test_models_that_span_nothing_or_do_not_fit_are_told(
    run_folder: Path, write_changed: Callable[..., Path]
) -> None:
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
         r"inf.safetensors: 'conv_in.bias' holds"),
        (write_changed("wide.safetensors", other, **{"conv_in.bias": wide}), ArtifactError,
         r"wide.safetensors: 'conv_in.bias' has shape"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            analyze(BASE, first, third)
