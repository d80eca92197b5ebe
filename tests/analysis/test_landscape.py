"""Landscapes of loss: those of a plain loop over the draws, however many processes and stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deme_cli.analysis.intervals import estimate
from deme_cli.analysis.landscape.directions import basis_of
from deme_cli.analysis.landscape.field import Field, Setup, held_out_loss
from deme_cli.analysis.landscape.found import Landscape
from deme_cli.analysis.landscape.grid import axes_of, origin_index
from deme_cli.analysis.landscape.measure import LandscapeAnalysis, measure_landscape, total_points
from deme_cli.analysis.landscape.picture import contour_levels, draw_landscape
from deme_cli.analysis.landscape.reading import axis_labels, read_landscape
from deme_cli.analysis.landscape.subspace import Weights, has_any_projections, open_models
from deme_cli.analysis.unfinished import Step
from deme_cli.analysis_config import LandscapeConfig
from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import DataConfig
from deme_cli.diffusion.denoiser import assemble, predict
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ConfigError, NumericsError, Stopped
from deme_cli.timesteps import split_uniform

CONFIG = LandscapeConfig(points=3, num=12, report_num=16, batch_size=5)
Opened = Callable[..., LandscapeAnalysis]


@pytest.fixture
def opened(finished_run: Path, tmp_path: Path) -> Opened:
    """An analysis of models by name or path, the last `marked` of them only shown."""

    def make(
        along: str, *names: str | Path, marked: int = 0, **settings: object
    ) -> LandscapeAnalysis:
        paths = tuple(
            str(finished_run / f"{name}.safetensors" if isinstance(name, str) else name)
            for name in names
        )
        models = open_models(paths)
        basis = basis_of(along, models, len(paths) - marked)
        setup = Setup(
            paths, has_any_projections(models), None if basis is None else basis.mixing,
            replace(CONFIG, along=along, **settings), DataConfig(source="digits"), "train",
            cache="off", beside=tmp_path, pipeline=None, device="cpu",
        )  # fmt: skip
        record, examples = setup.open_examples(models[0].record)
        schedule = read_schedule(record.scheduler_config)
        ranges = split_uniform(2, record.num_train_timesteps)
        output = tmp_path / "landscape.json"
        return LandscapeAnalysis(models, setup, basis, schedule, examples, ranges, output)

    return make


def finish(analysis: LandscapeAnalysis, **options: bool) -> Landscape:
    *steps, last = measure_landscape(analysis, **options)
    assert isinstance(last, Landscape)
    assert steps[-1].done <= total_points(analysis)
    return last


def same(one: Landscape, other: Landscape) -> bool:
    return repr(one) == repr(other) and np.array_equal(one.losses, other.losses)


def losses_of(analysis: LandscapeAnalysis, weights: Weights, *, fresh: bool) -> np.ndarray:
    """The loss of all timesteps and of each range, one draw after the other."""
    record, examples = analysis.models[0].record, analysis.examples
    network, schedule = assemble(record, weights, "here").network, analysis.schedule
    draws = held_out_loss(examples, schedule, analysis.config, fresh=fresh).draws
    errors, times = [], []
    for i in range(len(draws.t)):
        x0, _ = examples.draw([int(draws.images[i])], flip=None, generator=None)
        eps, t = draws.noise(torch.tensor([i])), draws.t[i : i + 1]
        with torch.no_grad():
            output = predict(network, schedule.add_noise(x0, eps, t), t)
        errors.append((output - eps).square().double().mean().item())
        times.append(int(t))
    groups = [[e for e, t in zip(errors, times, strict=True) if t in g] for g in analysis.groups]
    return np.array([np.mean(group) for group in groups])


def mixed(analysis: LandscapeAnalysis, *shares: float) -> Weights:
    """theta_0 + sum_i share_i (theta_i - theta_0)"""
    origin, *others = (model.weights for model in analysis.models)
    return {
        name: theta + sum(c * (o[name] - theta) for c, o in zip(shares, others, strict=False))
        for name, theta in origin.items()
    }


def test_points_are_those_of_a_loop_over_the_draws(opened: Opened) -> None:
    analysis = opened("vectors", "base", "ft_1of4", "ft_2of4", "ft_3of4", marked=1)
    found = finish(analysis)
    assert found.losses.shape == (3, 3, 3)
    x, y = found.axes[0][2], found.axes[1][0]
    shares = np.array([x, y]) @ analysis.basis.mixing
    expected = losses_of(analysis, mixed(analysis, *shares), fresh=False)
    assert found.losses[:, 2, 0] == pytest.approx(expected, rel=1e-5)
    origin = losses_of(analysis, analysis.models[0].weights, fresh=True)
    assert found.origin == pytest.approx(origin, rel=1e-6)
    for seen, model in zip(found.models, analysis.models, strict=True):
        own = losses_of(analysis, model.weights, fresh=True)
        assert seen.losses == pytest.approx(own, rel=1e-5)
        assert seen.percent == pytest.approx(100 * (own / origin - 1), abs=1e-3)
    again = finish(replace(analysis, setup=replace(analysis.setup, config=replace(
        analysis.config, batch_size=64))), force=True)  # fmt: skip
    assert np.allclose(again.losses, found.losses, rtol=1e-5)


def test_at_the_origin_the_network_is_the_models_own(opened: Opened) -> None:
    analysis = opened("random", "base")
    found = finish(analysis)
    field = Field(analysis.setup, analysis.examples)
    network = field.denoiser.network
    draws = held_out_loss(analysis.examples, analysis.schedule, analysis.config, fresh=False).draws
    expected = analysis.draws_by_group(fresh=False).means(draws.errors(network).numpy())
    assert np.array_equal(found.losses[(slice(None), *origin_index(found.axes))], expected)
    assert not found.percent[(slice(None), *origin_index(found.axes))].any()


def test_an_expert_is_as_good_as_its_place_on_the_plane_says(opened: Opened) -> None:
    analysis = opened("vectors", "base", "ft_1of4", "ft_2of4")
    field = Field(analysis.setup, analysis.examples)
    place = analysis.basis.coordinates[1]
    field.subspace.put(field.denoiser.network, place.tolist())
    weights = analysis.models[2].weights
    for name, theta in field.denoiser.network.state_dict().items():
        assert torch.allclose(theta, weights[name], atol=1e-6)


def test_slopes_are_the_gradients_along_the_axes(opened: Opened) -> None:
    analysis = opened("random", "base", span=0.004)
    found = finish(analysis)
    field = Field(analysis.setup, analysis.examples)
    directions, network = field.subspace.directions, field.denoiser.network
    draws = held_out_loss(analysis.examples, analysis.schedule, analysis.config, fresh=True).draws
    loss = draws.loss_and_gradient(network, lambda *_: None)
    gradients = {name: own.grad for name, own in network.named_parameters()}
    slopes = [sum(float((gradients[n] * d[n]).sum()) for n in d) for d in directions]
    assert found.slopes[0] == pytest.approx(slopes, rel=1e-2)
    assert found.steepness[0] == pytest.approx(100 * np.linalg.norm(slopes) / loss, rel=1e-2)


def test_a_line_reaches_both_ends_and_its_barrier_is_the_highest_rise(opened: Opened) -> None:
    analysis = opened("line", "ft_1of4", "ft_2of4", points=7)
    found = finish(analysis)
    (a,) = found.axes
    assert a == pytest.approx([-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25])
    ends = [losses_of(analysis, model.weights, fresh=False) for model in analysis.models]
    assert found.losses[:, 1] == pytest.approx(ends[0], rel=1e-6)
    assert found.losses[:, 5] == pytest.approx(ends[1], rel=1e-5)
    rise = found.losses - np.outer(ends[0], 1 - a) - np.outer(ends[1], a)
    for group, pick in enumerate(found.barriers):
        assert rise[(group, *pick.index)] == pytest.approx(rise[group, 1:6].max(), abs=1e-6)
        (at,) = pick.coordinates
        fresh = [
            losses_of(analysis, weights, fresh=True)[group]
            for weights in (mixed(analysis, at), mixed(analysis, 0), mixed(analysis, 1))
        ]
        expected = fresh[0] - (1 - at) * fresh[1] - at * fresh[2]
        assert pick.difference == pytest.approx(expected, abs=1e-6)
    reading = read_landscape(found, 2)
    assert reading.startswith("on the line from ft_1of4 to ft_2of4, ")
    assert "over the straight line of its ends" in reading
    png, svg = draw_landscape(found, axis_labels(analysis), title="a line", foot="tiny")
    assert png.startswith(b"\x89PNG")
    assert b"</svg>" in svg


def test_the_lowest_point_is_told_by_fresh_draws(opened: Opened) -> None:
    analysis = opened("random", "base", span=0.3)
    found = finish(analysis)
    pick = found.lowest[2]
    assert pick.loss == found.losses[2].min() == found.losses[(2, *pick.index)]
    field = Field(analysis.setup, analysis.examples)
    draws = held_out_loss(analysis.examples, analysis.schedule, analysis.config, fresh=True).draws
    errors = []
    for place in ((0.0, 0.0), pick.coordinates):
        field.subspace.put(field.denoiser.network, place)
        errors.append(draws.errors(field.denoiser.network).numpy())
    inside = (draws.t >= 50).numpy()
    differences = (errors[1] - errors[0])[inside]
    assert pick.difference == pytest.approx(differences.mean(), rel=1e-9)
    half = estimate(differences, draws.images.numpy()[inside]).half
    assert pick.interval == pytest.approx(half, rel=1e-9)
    assert pick.percent == pytest.approx(100 * differences.mean() / errors[0][inside].mean())


def test_processes_and_stops_leave_the_numbers_alone(opened: Opened) -> None:
    analysis = opened("vectors", "base", "ft_1of4", "ft_2of4")
    shared = opened("vectors", "base", "ft_1of4", "ft_2of4", jobs=2)
    whole = finish(replace(analysis, output=analysis.output.with_name("whole.json")))
    steps = measure_landscape(shared)
    while next(steps).done < 11:  # 7 probes, then points
        pass
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped, match=r"after 1\d of 20 points; run the same") as stopped:
        for _ in steps:
            pass
    assert stopped.value.exit_code == 130
    first, *_, last = measure_landscape(analysis)
    assert first.done >= 11
    assert first.note == f"continuing after {first.done} points"
    assert same(last, whole)
    other = replace(analysis, setup=replace(analysis.setup, split="held-out"))
    first = next(measure_landscape(other))
    assert first == Step(0, "what was measured before had another split; measuring all of it anew")


def test_a_plane_of_other_models_is_another_one(opened: Opened) -> None:
    three, four = ("base", "ft_1of4", "ft_2of4", "ft_3of4"), {"report_num": 4, "num": 4}
    steps = measure_landscape(opened("pca", *three, marked=1, **four))
    while next(steps).done < 2:
        pass
    steps.close()
    first = next(measure_landscape(opened("pca", *three, **four)))
    assert first.done == 0
    assert "had another spanning models; measuring" in first.note


def write_scaled(path: Path, source: Path, scale: float) -> Path:
    """A model with all weights of another times `scale`."""
    weights = {name: scale * theta for name, theta in load_tensors(source).items()}
    write_artifact(path, weights, read_record(source))
    return path


def test_a_point_that_is_not_finite_is_left_blank(
    opened: Opened, finished_run: Path, tmp_path: Path
) -> None:
    far = write_scaled(tmp_path / "far.safetensors", finished_run / "ft_2of4.safetensors", 1e25)
    analysis = opened("vectors", "base", "ft_1of4", far)
    found = finish(analysis)
    assert np.isnan(found.losses[0, :, 2]).all()
    assert found.num_not_finite >= 3
    assert "points have a loss that is not finite" in read_landscape(found, 3)
    png, svg = draw_landscape(found, axis_labels(analysis), title="far", foot="tiny")
    assert png.startswith(b"\x89PNG")
    assert b"grey: not finite" in svg
    base = finished_run / "base.safetensors"
    broken = write_scaled(tmp_path / "nan.safetensors", base, np.nan)
    with pytest.raises(NumericsError, match=r"nan.safetensors: the loss of timesteps 0:100 is not"):
        finish(replace(opened("random", broken), output=tmp_path / "nan.json"))


def test_a_range_needs_draws(opened: Opened) -> None:
    analysis = opened("random", "base", num=2)
    with pytest.raises(ConfigError, match=r"0:50 have 1 of 2 draws; raise --num"):
        finish(analysis)


def test_axes_hold_the_origin_and_all_models() -> None:
    places = np.array([[1.0, 0.0], [-0.1, 1.2]])
    for points in (3, 4, 15, 21):
        for axis, low, high in zip(
            axes_of(places, LandscapeConfig(along="vectors", points=points)),
            (-0.1, 0.0), (1.0, 1.2), strict=True,
        ):  # fmt: skip
            assert len(axis) == points
            assert (axis == 0).sum() == 1
            assert axis[0] < low
            assert axis[-1] > high
            assert np.allclose(np.diff(axis), axis[1] - axis[0])
        (line,) = axes_of(places[:, :1], LandscapeConfig(along="line", points=points))
        assert len(line) == points
        assert {0.0, 1.0} <= set(line)
    axis, _ = axes_of(places, LandscapeConfig(along="random", points=5, span=2))
    assert axis == pytest.approx([-2, -1, 0, 1, 2])


def test_contour_levels_are_symmetric_and_show_what_is_better() -> None:
    percent = np.array([[[0.0, -0.5], [20.0, 90.0]], [[0.0, 1.0], [2.0, np.nan]]])
    levels = contour_levels(percent)
    assert levels == pytest.approx(-levels[::-1])
    assert 0.1 < min(levels[levels > 0]) <= 0.25
    assert max(levels) >= 50
    assert 0 in contour_levels(np.zeros((1, 2, 2)))
