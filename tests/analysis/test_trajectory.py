"""Trajectories: what the network saw, the x_0 it implies, who acted; resumed as never stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_base, write_tiny_expert
from diffusers import DDIMScheduler

from deme_cli.analysis.lineup import line_up
from deme_cli.analysis.trajectory.found import Trajectories, read_trajectories
from deme_cli.analysis.trajectory.measure import (
    TrajectoryAnalysis,
    measure_trajectories,
    open_trajectories,
    spread,
    steps_of,
)
from deme_cli.analysis.trajectory.picture import _cell, draw_trajectories
from deme_cli.analysis.unfinished import Step, unfinished_path
from deme_cli.analysis_config import TrajectoryConfig
from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.config import SampleConfig
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.errors import NumericsError, Stopped
from deme_cli.records import MergedRecord
from deme_cli.sampling.ensemble import open_ensemble
from deme_cli.sampling.finish import to_levels
from deme_cli.sampling.noise import seeded_noise
from deme_cli.sampling.sampler import Forward, collect_images, sample_images, single
from deme_cli.timesteps import TimestepRange, route, split_uniform

CONFIG = SampleConfig(num=3, steps=5)
RANGES = split_uniform(4, 100)


def open_all(folder: Path, output: Path, config: SampleConfig = CONFIG) -> TrajectoryAnalysis:
    names = [str(path) for path in sorted(folder.glob("*.safetensors"))]
    return open_trajectories(
        line_up(names), config, TrajectoryConfig(num=3, shown=4, rows=3), output
    )


@pytest.fixture
def analysis(finished_run: Path, tmp_path: Path) -> TrajectoryAnalysis:
    return open_all(finished_run, tmp_path / "trajectory.json")


@pytest.fixture(scope="module")
def found(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    """All of the finished run, found without a stop."""
    return finish(open_all(finished_run, tmp_path_factory.mktemp("found") / "trajectory.json"))


def finish(analysis: TrajectoryAnalysis, **options: bool) -> Trajectories:
    *_, last = measure_trajectories(analysis, **options)
    assert isinstance(last, Trajectories)
    return last


def require_same(found: Trajectories, other: Trajectories) -> None:
    assert (found.times, found.columns) == (other.times, other.columns)
    for one, two in zip(found.trajectories, other.trajectories, strict=True):
        assert (one.name, one.acted) == (two.name, two.acted)
        assert np.array_equal(one.pictures, two.pictures)
        for name, distance in one.distances.items():
            assert np.array_equal(distance.steps, two.distances[name].steps)
            assert np.array_equal(distance.final, two.distances[name].final)


def forwards(experts: list, config: SampleConfig = CONFIG) -> list[Forward]:
    seen: list[Forward] = []
    list(sample_images(experts, config, watch=seen.append))
    return seen


def test_the_watcher_sees_what_the_network_saw(finished_run: Path) -> None:
    denoiser = load_denoiser(finished_run / "base.safetensors")
    scheduler = DDIMScheduler.from_config(denoiser.record.scheduler_config)
    scheduler.set_timesteps(5)
    x_t = seeded_noise(0, (1, 8, 8), range(3))
    seen = forwards(single(denoiser))
    assert [forward.step for forward in seen] == list(range(5))
    for forward, t in zip(seen, scheduler.timesteps, strict=True):
        output = predict(denoiser.network, x_t, t)
        assert (forward.start, forward.t, forward.expert) == (0, int(t), 0)
        assert torch.equal(forward.x_t, x_t)
        assert torch.equal(forward.output, output)
        step = scheduler.step(output, t, x_t)
        x0 = denoiser.schedule.x0_of(output, x_t, float(t))
        torch.testing.assert_close(x0.clamp(-1, 1), step.pred_original_sample, atol=1e-4, rtol=0)
        x_t = step.prev_sample


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_who_acts_is_who_owns_the_timestep(finished_run: Path, sampler: str) -> None:
    experts = open_ensemble(sorted(finished_run.glob("ft_*.safetensors")))
    config = replace(CONFIG, sampler=sampler, batch_size=2)
    seen = forwards(experts, config)
    assert {forward.start for forward in seen} == {0, 2}
    assert [forward.expert for forward in seen] == [route(f.t, RANGES) for f in seen]
    assert len({forward.expert for forward in seen}) == 4


def test_distances_are_those_of_the_predicted_x0_and_of_the_images(
    found: Trajectories, analysis: TrajectoryAnalysis, finished_run: Path
) -> None:
    names = ["base", *(f"ft_{i}of4" for i in range(1, 5)), "ensemble"]
    assert [one.name for one in found.trajectories] == names
    assert (found.references, found.unit) == (["base", "ensemble"], "levels of 255")
    schedule = load_denoiser(finished_run / "base.safetensors").schedule

    def levels(experts: list) -> np.ndarray:
        x0 = [schedule.x0_of(f.output, f.x_t, f.t) for f in forwards(experts)]
        return (torch.stack(x0).clamp(-1, 1) * 127.5).double().numpy()

    expert, ensemble = analysis.entrants[3], analysis.entrants[5]
    difference = levels(expert.experts) - levels(ensemble.experts)
    distance = found.trajectories[3].distances["ensemble"]
    assert np.allclose(distance.steps, np.sqrt((difference**2).mean(axis=(2, 3, 4))), atol=1e-4)
    images = [collect_images(e.experts, CONFIG).astype(float) for e in (expert, ensemble)]
    ends = np.sqrt(((images[0] - images[1]) ** 2).mean(axis=(1, 2, 3)))
    assert np.allclose(distance.final, ends)
    base = found.trajectories[0].distances
    assert not base["base"].steps.any()
    assert np.array_equal(base["ensemble"].steps, found.trajectories[5].distances["base"].steps)
    assert found.trajectories[5].acted == [route(t, RANGES) for t in found.times]
    assert found.trajectories[4].distances["ensemble"].steps[0].max() == 0  # it acts first


def test_the_last_pictures_are_the_images_of_sample(
    found: Trajectories, analysis: TrajectoryAnalysis
) -> None:
    for one, entrant in zip(found.trajectories, analysis.entrants, strict=True):
        assert one.pictures.shape == (3, 5, 8, 8, 1)
        assert np.array_equal(one.pictures[:, -1], collect_images(entrant.experts, CONFIG))


def test_an_ensemble_of_copies_goes_the_way_of_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    write_tiny_base(base)
    for index in (1, 2, 3, 4):
        write_tiny_expert(tmp_path / f"ft_{index}of4.safetensors", base, index=index, of=4, scale=0)
    config = replace(CONFIG, sampler="ddpm")  # the fresh noise of its steps is shared as well
    found = finish(open_all(tmp_path, tmp_path / "trajectory.json", config))
    for one in found.trajectories:
        assert np.array_equal(one.pictures, found.trajectories[0].pictures)
        assert not one.distances["base"].steps.any()
        assert not one.distances["ensemble"].final.any()
    assert "ensemble and base predict the same x_0 in every step" in read_trajectories(found)


def test_nothing_depends_on_the_batch_size(
    found: Trajectories, analysis: TrajectoryAnalysis
) -> None:
    pairs = finish(replace(analysis, config=replace(analysis.config, batch_size=2)))
    for one, two in zip(found.trajectories, pairs.trajectories, strict=True):
        assert np.abs(one.pictures.astype(int) - two.pictures).max() <= 1
        assert np.allclose(one.distances["base"].steps, two.distances["base"].steps, atol=1e-2)


def test_a_resumed_analysis_equals_an_uninterrupted_one(
    found: Trajectories, analysis: TrajectoryAnalysis
) -> None:
    steps = measure_trajectories(analysis)
    while next(steps).done < 8:  # base and ensemble, and more than half of an expert
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="after 2 of 6 models") as stopped:
        next(steps)
    assert stopped.value.exit_code == 75
    again = list(measure_trajectories(analysis))
    assert again[0] == Step(6, "continuing after 2 of 6 models")
    assert again[-2] == Step(analysis.total)
    require_same(again[-1], found)
    other = replace(analysis, settings=replace(analysis.settings, shown=3))
    assert "had another shown; measuring all of it anew" in next(measure_trajectories(other)).note
    assert next(measure_trajectories(analysis, force=True)) == Step(0)
    assert not unfinished_path(analysis.output).exists()


def test_a_broken_model_is_an_error(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    record = write_tiny_base(base)
    weights = load_tensors(base)
    weights["conv_out.bias"].fill_(float("nan"))
    write_artifact(base, weights, record)
    with pytest.raises(NumericsError, match="images 0 to 2 are not finite"):
        finish(open_all(tmp_path, tmp_path / "trajectory.json"))


def test_steps_are_even_and_the_last_of_those_at_one_time() -> None:
    assert spread(20, 4) == [0, 6, 13, 19]
    assert spread(3, 10) == [0, 1, 2]
    assert spread(5, 1) == [0]
    assert steps_of([9, 7, 7, 5, 5, 3]) == [0, 2, 4, 5]
    kept = steps_of(range(1000))
    assert (len(kept), kept[0], kept[-1]) == (100, 0, 999)


def test_the_reading_tells_whom_merged_ends_nearer_to(finished_run: Path, tmp_path: Path) -> None:
    weights = load_tensors(finished_run / "ft_2of4.safetensors")
    base = load_denoiser(finished_run / "base.safetensors").record
    record = MergedRecord(
        source=base.source, model_config=base.model_config, scheduler_config=base.scheduler_config,
        num_train_timesteps=100, base=base.fingerprint, parents=[], coefficients=[],
        method="linear", projection="none",
    )  # fmt: skip
    write_artifact(tmp_path / "merged.safetensors", weights, record)
    names = [*finished_run.glob("*.safetensors"), tmp_path / "merged.safetensors"]
    entrants = line_up(sorted(map(str, names)))
    settings = TrajectoryConfig(num=3, shown=3, rows=2)
    found = finish(open_trajectories(entrants, CONFIG, settings, tmp_path / "trajectory.json"))
    merged, ensemble = found.of_kind("merged"), found.of_kind("ensemble")
    assert merged is not None
    assert ensemble is not None
    near, far = (merged.distances[name].final for name in ("ensemble", "base"))
    ends = [f"{far.mean():.1f} ± {far.std(ddof=1) / 3**0.5:.1f}" for far in (near, far)]
    assert (
        f"merged ends {ends[0]} from ensemble and {ends[1]} from base (nearer to ensemble in "
        f"{(near < far).sum()} of 3 images)"
    ) in read_trajectories(found)
    step = found.nearest(ensemble, "base")
    assert step == ensemble.distances["base"].steps.mean(axis=1).argmin()
    assert f"predict most alike at t = {found.times[step]:.0f} " in read_trajectories(found)
    assert merged.experts == [(TimestepRange(0, 100), "merged")]
    assert np.array_equal(merged.pictures, found.trajectories[2].pictures)  # of the same weights


@pytest.mark.parametrize(
    ("name", "subject"), [("sd3", {"prompts": "text:a dog"}), ("dit", {"classes": "1,3"})]
)
def test_latents_are_compared_as_they_are_and_decoded_where_they_are_shown(
    pipelines: Callable[..., Path], tmp_path: Path, name: str, subject: dict[str, str]
) -> None:
    config = SampleConfig(num=2, steps=3, guidance=2.0, **subject)
    settings = TrajectoryConfig(num=2, shown=2, rows=1)
    entrants = line_up([str(pipelines(name))])
    analysis = open_trajectories(entrants, config, settings, tmp_path / "trajectory.json")
    found = finish(analysis)
    (only,) = found.trajectories
    assert (found.unit, found.references) == ("latent units", [])
    seen: list[Forward] = []
    list(sample_images(entrants[0].experts, config, scene=analysis.scene, watch=seen.append))
    denoiser = entrants[0].experts[0].load()
    for picture, forward in zip(only.pictures[0], (seen[0], seen[-1]), strict=False):
        x0 = denoiser.schedule.x0_of(forward.output, forward.x_t, forward.t)[:1]
        assert np.array_equal(picture, to_levels(analysis.scene.companions.decode(x0))[0])
    images = collect_images(entrants[0].experts, config, scene=analysis.scene)
    assert np.array_equal(only.pictures[0, -1], images[0])


def test_the_png_stays_below_two_megabytes_and_tiny_pictures_stay_large(
    found: Trajectories,
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 5, 128, 128, 3), np.uint8)
    large = [replace(one, pictures=noise) for one in found.trajectories]
    large = replace(found, trajectories=large)
    assert len(draw_trajectories(large, foot="")[0]) < 2e6
    assert _cell(large) < 0.5 < _cell(found)
