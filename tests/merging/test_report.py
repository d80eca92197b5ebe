"""The report: figures that are what they say, intervals that are as wide as they should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.config import MergeConfig
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.errors import NumericsError
from deme_cli.merging.candidates import Workbench
from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.methods import LINEAR
from deme_cli.merging.plan import REPORT, open_plan
from deme_cli.merging.report import Metric, Sample, measure_rows, verdict
from deme_cli.merging.search import Stage
from deme_cli.run_file import RunFile
from deme_cli.sampling.ensemble import open_ensemble, single
from deme_cli.timesteps import TimestepRange

SEEDS = (2_000_003, 2_000_004)
W = (0.5, -0.25, 0.75, 0.25)
RANGES = [TimestepRange(start, start + 25) for start in (0, 25, 50, 75)]


def go_on(*progress: int) -> None:
    """A check that never stops."""


def open_bench(*numbers: int) -> Workbench:
    """What measures merges of these experts in the current folder, of all by default."""
    paths = [Path(f"ft_{index}of4.safetensors") for index in numbers or (1, 2, 3, 4)]
    run = RunFile(tables={"data": {"source": "digits"}})
    return Workbench(open_plan(paths, MergeConfig(), run=run, output=Path("m.safetensors")))


@pytest.fixture
def bench(run_folder: Path) -> Workbench:
    return open_bench()


def open_metric(
    bench: Workbench, name: str = "loss", num: int = 48, seeds: Sequence[int] = SEEDS
) -> Metric:
    config = MergeConfig(steps=2, batch_size=64)
    return [bench.open(Stage(name, num, 1), replace(config, seed=s), REPORT) for s in seeds]


def measured(
    bench: Workbench, *metrics: Metric, ensemble: bool = True, w: Sequence[float] = W
) -> dict[str, dict[str, Any]]:
    """Figures of base, ensemble, and the linear merge at w, by row and metric."""
    zero = [0.0] * len(w)
    rows = [("base", zero, lambda: bench.at(zero, LINEAR))]
    if ensemble:
        rows.append(("ensemble", None, bench.ensemble))
    rows.append(("merged", list(w), lambda: bench.at(w, LINEAR)))
    ranges = sorted(expert.record.timesteps for expert in bench.inputs.experts)
    documents = [document for document, _ in measure_rows(rows, metrics, ranges, go_on)]
    assert documents[-1]["coefficients"] == list(w)
    return {document["name"]: document["metrics"] for document in documents}


def half_of(metric: dict[str, Any]) -> float:
    low, high = metric["interval"]
    return (high - low) / 2


def test_every_figure_is_that_of_a_plain_computation(bench: Workbench) -> None:
    metric, path = open_metric(bench), Path("merged.safetensors")
    experts = [expert.path for expert in bench.inputs.experts]
    merge_inputs(bench.inputs, W, path)
    rows = measured(bench, metric)
    base, merged = (single(load_denoiser(file)) for file in (bench.inputs.base.path, path))
    models = {"base": base, "ensemble": open_ensemble(experts), "merged": merged}
    errors = {
        name: np.array([objective.errors(model, go_on).numpy() for objective in metric])  # (R, n)
        for name, model in models.items()
    }
    times = np.array([o.draws.t.numpy() for o in metric])
    for name, row in rows.items():
        loss = row["loss"]
        assert loss["values"] == pytest.approx(errors[name].mean(axis=1), rel=1e-5)
        assert loss["value"] == pytest.approx(errors[name].mean(), rel=1e-5)
        expected = (errors[name] - errors["base"]).mean()
        assert loss["difference"] == pytest.approx(expected, abs=1e-6)
        for span in RANGES:
            inside = (times >= span.start) & (times < span.stop)
            parts = [e[mine].mean() for e, mine in zip(errors[name], inside, strict=True)]
            assert row[f"loss {span}"]["value"] == pytest.approx(np.mean(parts), rel=1e-5)
    assert rows["base"]["loss"]["gain_kept"] is None
    assert rows["base"]["loss"]["interval"] == [0, 0]


def test_the_share_of_the_gain_is_1_for_the_ensemble_and_0_for_the_base(bench: Workbench) -> None:
    theta = load_tensors(bench.inputs.base.path)  # of random weights: saying less is better
    for index, expert in enumerate(bench.inputs.experts):
        less = {k: v * (0.5 + 1e-4 * index if "conv_out" in k else 1) for k, v in theta.items()}
        write_artifact(expert.path, less, expert.record)
    better = open_bench()
    for w, share in ((0.25, 1.0), (0.0, 0.0), (0.1, None)):
        rows = measured(better, open_metric(better), w=(w,) * 4)
        base, ensemble, merged = (rows[k]["loss"] for k in ("base", "ensemble", "merged"))
        assert ensemble["difference"] < 0
        expected = (base["value"] - merged["value"]) / (base["value"] - ensemble["value"])
        assert merged["gain_kept"] == pytest.approx(expected)
        assert share is None or merged["gain_kept"] == pytest.approx(share, abs=1e-3)


def test_a_timestep_without_an_expert_counts_for_no_range(run_folder: Path) -> None:
    pair = open_bench(1, 3)
    metric = open_metric(pair, num=400, seeds=SEEDS[:1])
    row = measured(pair, metric, ensemble=False, w=(1.0, 0.5))["merged"]
    (objective,) = metric
    errors = objective.errors(pair.at((1.0, 0.5), LINEAR), go_on).numpy()
    times = objective.draws.t.numpy()
    for start in (0, 50):
        inside = (times >= start) & (times < start + 25)
        found = row[f"loss {start}:{start + 25}"]["value"]
        assert found == pytest.approx(errors[inside].mean(), rel=1e-9)
    assert set(row) == {"loss", "loss 0:25", "loss 50:75"}


def test_the_interval_is_that_of_a_bootstrap_over_images_with_all_their_draws(
    bench: Workbench,
) -> None:
    metric = open_metric(bench, num=300)  # some 180 images: most of them drawn twice
    merged = measured(bench, metric, ensemble=False)["merged"]["loss"]
    pairs = []
    for objective in metric:
        base = objective.errors(bench.at([0.0] * 4, LINEAR), go_on).numpy()
        pairs.append((objective.errors(bench.at(W, LINEAR), go_on).numpy() - base,
                      objective.draws.images.numpy()))  # fmt: skip
    draw, means = np.random.default_rng(1), []
    for _ in range(1000):
        parts = []
        for difference, images in pairs:
            known, place = np.unique(images, return_inverse=True)
            chosen = draw.integers(0, len(known), len(known))
            sums, counts = np.bincount(place, difference), np.bincount(place)
            parts.append(sums[chosen].sum() / counts[chosen].sum())
        means.append(np.mean(parts))
    low, high = merged["interval"]
    assert half_of(merged) == pytest.approx(1.96 * np.std(means), rel=0.2)
    assert (high + low) / 2 == pytest.approx(merged["difference"])


@pytest.mark.parametrize(("name", "metric"), [("fid", "frechet_digits"), ("kid", "kernel_digits")])
def test_distances_are_those_of_the_objective_and_their_interval_that_of_images_drawn_again(
    bench: Workbench, name: str, metric: str
) -> None:
    opened = open_metric(bench, name, num=40)
    row = measured(bench, opened, ensemble=False)["merged"][metric]
    made = [[o.features(bench.at(w, LINEAR), go_on) for o in opened] for w in (W, [0.0] * 4)]
    values, zero = ([o.distance(f) for o, f in zip(opened, fs, strict=True)] for fs in made)
    assert row["values"] == pytest.approx(values, rel=1e-6)
    assert row["difference"] == pytest.approx(np.mean(values) - np.mean(zero), rel=1e-4)
    draw, means = np.random.default_rng(1), []
    for _ in range(200 if name == "fid" else 25):
        parts = []
        for objective, here, there in zip(opened, *made, strict=True):
            chosen = draw.integers(0, len(here), len(here))
            parts.append(objective.distance(here[chosen]) - objective.distance(there[chosen]))
        means.append(np.mean(parts))
    assert 0.55 * 1.96 * np.std(means) < half_of(row) < 1.8 * 1.96 * np.std(means)


def test_a_row_that_is_not_finite_has_no_figures_and_a_base_that_is_not_ends_it(
    bench: Workbench,
) -> None:
    expert = bench.inputs.experts[1]
    nan = load_tensors(expert.path)
    nan["conv_in.bias"] *= math.nan
    write_artifact(expert.path, nan, expert.record)
    spoilt = open_bench()
    metrics = open_metric(spoilt), open_metric(spoilt, "fid", num=8, seeds=SEEDS[:1])
    rows = measured(spoilt, *metrics)
    for metric in ("loss", "frechet_digits", "loss 25:50"):
        broken = rows["merged"][metric]
        assert broken["value"] is broken["difference"] is broken["gain_kept"] is None
        assert broken["interval"] == [None, None]
    assert rows["ensemble"]["loss"]["value"] is None, "the second expert owns a range"
    assert math.isfinite(rows["ensemble"]["loss 0:25"]["value"])
    bad = [("base", None, lambda: spoilt.at((0.0, 1.0, 0.0, 0.0), LINEAR))]
    for metric in metrics:
        with pytest.raises(NumericsError, match="the base's own figures are not finite"):
            list(measure_rows(bad, [metric], RANGES, go_on))


def test_the_verdict_says_against_whom_the_merged_model_is_surely_better() -> None:
    draw = np.random.default_rng(0)
    errors = draw.uniform(1, 2, 400)

    def sample(values: np.ndarray) -> list[Sample]:
        return [Sample(values.mean(), 400, lambda chosen: float(values[chosen].mean()))]

    noise = draw.normal(0, 0.5, 400)
    rivals = {"base": sample(errors + 0.5 + noise), "ensemble": sample(errors - 0.5 - noise)}
    line, better = verdict("loss", sample(errors), rivals), -0.5 - noise.mean()
    assert line.startswith(f"on 1 other seed and other images: loss {errors.mean():.3f}, better")
    assert f"better than the base ({better:.3f} ± 0.0" in line
    assert f"worse than the ensemble (+{-better:.3f} ± 0.0" in line
    noisy = {"base": sample(errors + noise), "greedy soup": sample(errors)}
    line = verdict("loss", sample(errors), noisy)
    assert "not told apart from the base" in line
    assert line.endswith("the same as the greedy soup")
    assert "is not finite" in verdict("loss", sample(errors * math.nan), rivals)
