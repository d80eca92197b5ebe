"""The report: figures that are what they say, intervals that are as wide as they should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.config import DataConfig, MergeConfig, SampleConfig
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.errors import NumericsError
from deme_cli.merging.candidates import Evaluator
from deme_cli.merging.combine import merge_artifacts
from deme_cli.merging.inputs import Inputs, open_experts, open_inputs
from deme_cli.merging.methods import LINEAR
from deme_cli.merging.objectives import REPORT, SEARCH, HeldOutLoss, Workbench
from deme_cli.merging.plan import Measure
from deme_cli.merging.report import Metric, ReportRow, measure_rows
from deme_cli.merging.space import Space
from deme_cli.merging.successive_halving import Stage
from deme_cli.sampling.sampler import image_seed
from deme_cli.timesteps import TimestepRange

SEEDS = (2_000_003, 2_000_004)
W = (0.5, -0.25, 0.75, 0.25)
RANGES = [TimestepRange(start, start + 25) for start in (0, 25, 50, 75)]


def go_on(*progress: int) -> None:
    """A check that never stops."""


@pytest.fixture
def inputs(run_folder: Path) -> Inputs:
    paths = [run_folder / f"ft_{index}of4.safetensors" for index in range(1, 5)]
    return open_inputs(run_folder / "base.safetensors", open_experts(paths, "expert"))


def open_evaluator(inputs: Inputs) -> Evaluator:
    count = len(inputs.experts)
    space = Space(("",) * count, ((-1.0, 2.0),) * count, (1 / count,) * count)
    return Evaluator(inputs, space, method=LINEAR, device="cpu", dtype="fp32")


def open_meter(
    inputs: Inputs, name: str = "loss", num: int = 48, seeds: Sequence[int] = SEEDS
) -> Metric:
    bench, stage = open_bench(inputs), Stage(name, num, 1)
    config = MergeConfig(steps=2, batch_size=64)
    return [bench.open(stage, replace(config, seed=s), part=REPORT) for s in seeds]


def open_bench(inputs: Inputs, reference: str | None = None) -> Workbench:
    measure = Measure(
        DataConfig(source="digits"), "digits", "clean", SampleConfig(), report_reference=reference
    )
    return Workbench(measure, inputs.base_record)


def measured(
    inputs: Inputs, meters: Sequence[Metric], *, ensemble: bool = True, w: Sequence[float] = W
) -> dict[str, ReportRow]:
    """Base, ensemble, and the linear merge at w."""
    evaluator = open_evaluator(inputs)
    zero = [0.0] * len(inputs.experts)
    rows = [("base", zero, lambda: evaluator.linear(zero))]
    if ensemble:
        rows.append(("ensemble", None, evaluator.ensemble))
    rows.append(("merged", list(w), lambda: evaluator.linear(w)))
    ranges = sorted(expert.record.timesteps for expert in inputs.experts)
    return {row.name: row for row in measure_rows(rows, meters, ranges, go_on)}


def plain_errors(objective: HeldOutLoss, paths: Sequence[Path]) -> np.ndarray:
    """Squared errors draw by draw: (n,), by the one model, or by the expert of each timestep."""
    draws, models = objective.draws, [load_denoiser(path) for path in paths]
    schedule, found = models[0].schedule, []
    for index, (image, t) in enumerate(zip(draws.images.tolist(), draws.t.tolist(), strict=True)):
        x0, _ = draws.examples.draw([image], flip=None, generator=None)
        noise = torch.Generator().manual_seed(image_seed(objective.protocol["seed"], index))
        eps = torch.randn(1, 1, 8, 8, generator=noise)
        abar = schedule.alphas_cumprod[t]
        x_t = (abar.sqrt() * x0 + (1 - abar).sqrt() * eps).float()
        network = models[t // 25 if len(models) > 1 else 0].network
        with torch.no_grad():
            found.append((eps - predict(network, x_t, torch.tensor([t]))).square().mean().item())
    return np.array(found)


@pytest.fixture
def merged_path(inputs: Inputs, run_folder: Path) -> Path:
    path = run_folder / "merged.safetensors"
    merge_artifacts(inputs.base.path, [expert.path for expert in inputs.experts], W, path)
    return path


def test_every_figure_is_that_of_a_plain_computation(inputs: Inputs, merged_path: Path) -> None:
    meter = open_meter(inputs)
    rows = measured(inputs, [meter])
    files = {
        "base": [inputs.base.path],
        "ensemble": [expert.path for expert in inputs.experts],
        "merged": [merged_path],
    }
    errors = {
        name: np.array([plain_errors(o, paths) for o in meter])  # (R, n)
        for name, paths in files.items()
    }
    base = errors["base"].mean()
    for name, row in rows.items():
        loss = row.metrics["loss"]
        assert loss.values == pytest.approx(errors[name].mean(axis=1), rel=1e-5)
        assert loss.value == pytest.approx(errors[name].mean(), rel=1e-5)
        assert loss.difference == pytest.approx((errors[name] - errors["base"]).mean(), abs=1e-6)
    gain = base - errors["ensemble"].mean()
    kept = rows["merged"].metrics["loss"].gain_kept
    if gain > 0:
        assert kept == pytest.approx((base - errors["merged"].mean()) / gain, rel=1e-3)
    else:
        assert kept is None, "an ensemble that gains nothing has no share to keep"
    times = np.array([o.draws.t.numpy() for o in meter])
    for name, row in rows.items():
        for span in RANGES:
            inside = (times >= span.start) & (times < span.stop)
            parts = [e[mine].mean() for e, mine in zip(errors[name], inside, strict=True)]
            assert row.metrics[f"loss {span}"].value == pytest.approx(np.mean(parts), rel=1e-5)
    assert rows["base"].metrics["loss"].gain_kept is None
    assert rows["base"].document["metrics"]["loss"]["interval"] == [0, 0]
    assert rows["merged"].document["coefficients"] == list(W)


def test_the_share_of_the_gain_is_1_for_the_ensemble_and_0_for_the_base(inputs: Inputs) -> None:
    theta = load_tensors(inputs.base.path)  # of random weights: saying less is better
    for index, expert in enumerate(inputs.experts):
        less = {k: v * (0.5 + 1e-4 * index if "conv_out" in k else 1) for k, v in theta.items()}
        write_artifact(expert.path, less, expert.record)
    paths = [expert.path for expert in inputs.experts]
    better = open_inputs(inputs.base.path, open_experts(paths, "expert"))
    for w, share in ((0.25, 1.0), (0.0, 0.0), (0.1, None)):
        rows = measured(better, [open_meter(inputs)], w=(w,) * 4)
        base, ensemble, merged = (rows[k].metrics["loss"] for k in ("base", "ensemble", "merged"))
        assert ensemble.difference < 0
        expected = (base.value - merged.value) / (base.value - ensemble.value)
        assert merged.gain_kept == pytest.approx(expected)
        assert share is None or merged.gain_kept == pytest.approx(share, abs=1e-3)


def test_a_timestep_without_an_expert_counts_for_no_range(inputs: Inputs) -> None:
    paths = [inputs.experts[index].path for index in (0, 2)]
    pair = open_inputs(inputs.base.path, open_experts(paths, "expert"))
    meter = open_meter(inputs, num=400, seeds=SEEDS[:1])
    rows = measured(pair, [meter], ensemble=False, w=(1.0, 0.5))
    (objective,) = meter
    errors = objective.errors(open_evaluator(pair).linear((1.0, 0.5)), go_on).numpy()
    times = objective.draws.t.numpy()
    for start in (0, 50):
        inside = (times >= start) & (times < start + 25)
        found = rows["merged"].metrics[f"loss {start}:{start + 25}"].value
        assert found == pytest.approx(errors[inside].mean(), rel=1e-9)
    assert set(rows["merged"].metrics) == {"loss", "loss 0:25", "loss 50:75"}


def test_the_interval_is_that_of_a_bootstrap_over_images_with_all_their_draws(
    inputs: Inputs,
) -> None:
    meter = open_meter(inputs, num=300)  # some 180 images: most of them drawn twice
    evaluator = open_evaluator(inputs)
    rows = measured(inputs, [meter], ensemble=False)
    pairs = []
    for objective in meter:
        base = objective.errors(evaluator.linear([0.0] * 4), go_on).numpy()
        pairs.append((objective.errors(evaluator.linear(W), go_on).numpy() - base,
                      objective.draws.images.numpy()))  # fmt: skip
    draw, means = np.random.default_rng(1), []
    for _ in range(2000):
        parts = []
        for difference, images in pairs:
            known = np.unique(images)
            chosen = draw.choice(known, len(known))
            parts.append(np.concatenate([difference[images == k] for k in chosen]).mean())
        means.append(np.mean(parts))
    low, high = rows["merged"].metrics["loss"].interval
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(means), rel=0.2)
    assert (high + low) / 2 == pytest.approx(rows["merged"].metrics["loss"].difference)
    assert np.quantile(means, 0.2) > low
    assert np.quantile(means, 0.8) < high


def test_the_interval_shrinks_with_the_root_of_the_number_of_draws(inputs: Inputs) -> None:
    halves = []
    for num in (20, 180):  # images are not drawn twice
        rows = measured(inputs, [open_meter(inputs, num=num)], ensemble=False)
        low, high = rows["merged"].metrics["loss"].interval
        halves.append(high - low)
    assert halves[0] / halves[1] == pytest.approx(3, rel=0.4)


def test_the_interval_covers_the_difference_that_many_draws_show(inputs: Inputs) -> None:
    truth = measured(inputs, [open_meter(inputs, num=2000)], ensemble=False)
    expected = truth["merged"].metrics["loss"].difference
    covered = 0
    for seed in range(12):
        meter = open_meter(inputs, num=40, seeds=(3 * seed, 3 * seed + 1))
        low, high = measured(inputs, [meter], ensemble=False)["merged"].metrics["loss"].interval
        covered += low <= expected <= high
    assert covered >= 9, "95 % of 12 are 11"


@pytest.mark.parametrize(("name", "metric"), [("fid", "frechet_digits"), ("kid", "kernel_digits")])
def test_distances_are_those_of_the_objective_and_their_interval_that_of_images_drawn_again(
    inputs: Inputs, name: str, metric: str
) -> None:
    meter, evaluator = open_meter(inputs, name, num=40), open_evaluator(inputs)
    row = measured(inputs, [meter])["merged"].metrics[metric]
    values = [objective(evaluator.linear(W), go_on) for objective in meter]
    zero = [objective(evaluator.linear([0.0] * 4), go_on) for objective in meter]
    assert row.values == pytest.approx(values, rel=1e-6)
    assert row.difference == pytest.approx(np.mean(values) - np.mean(zero), rel=1e-4)
    draw, means = np.random.default_rng(1), []
    made = [[o.features(evaluator.linear(w), go_on) for o in meter]
            for w in (W, [0.0] * 4)]  # fmt: skip
    for _ in range(200 if name == "fid" else 40):
        parts = []
        for objective, here, there in zip(meter, *made, strict=True):
            chosen = draw.integers(0, len(here), len(here))
            parts.append(objective.distance(here[chosen]) - objective.distance(there[chosen]))
        means.append(np.mean(parts))
    low, high = row.interval
    half = 1.96 * np.std(means)
    assert 0.6 * half < (high - low) / 2 < 1.6 * half


def test_a_row_that_is_not_finite_has_no_difference_and_a_base_that_is_not_ends_it(
    inputs: Inputs,
) -> None:
    nan = load_tensors(inputs.experts[1].path)
    nan["conv_in.bias"] *= math.nan
    write_artifact(inputs.experts[1].path, nan, inputs.experts[1].record)
    experts = [p.path for p in inputs.experts]
    spoilt = open_inputs(inputs.base.path, open_experts(experts, "expert"))
    meters = [open_meter(inputs), open_meter(inputs, "fid", num=8, seeds=SEEDS[:1])]
    rows = measured(spoilt, meters)
    broken = rows["merged"].metrics
    for metric in ("loss", "frechet_digits", "loss 25:50"):
        assert math.isnan(broken[metric].value)
        assert broken[metric].gain_kept is None
        document = rows["merged"].document["metrics"][metric]
        assert document["value"] is document["difference"] is None
        assert document["interval"] == [None, None]
    ensemble = rows["ensemble"].metrics
    assert math.isnan(ensemble["loss"].value), "the second expert owns a range"
    assert math.isfinite(ensemble["loss 0:25"].value)
    assert math.isfinite(rows["base"].metrics["loss"].value)

    evaluator = open_evaluator(spoilt)
    bad = [("base", None, lambda: evaluator.linear((0.0, 1.0, 0.0, 0.0)))]
    for meter in meters:
        with pytest.raises(NumericsError, match="the base's own figures are not finite"):
            list(measure_rows(bad, [meter], RANGES, go_on))


def test_the_report_sees_other_images_seeds_and_reference_than_the_search(inputs: Inputs) -> None:
    bench, config = open_bench(inputs), MergeConfig(steps=2, num=400)
    search, report = (
        bench.open(Stage("loss", 400, 1), replace(config, seed=seed), part=part)
        for seed, part in ((config.seed, SEARCH), (config.report_seed, REPORT))
    )
    assert not set(search.draws.images.tolist()) & set(report.draws.images.tolist())
    together = set(search.draws.images.tolist()) | set(report.draws.images.tolist())
    assert len(together) == len(bench.examples), "every held-out image serves one of them"
    assert (search.protocol["split"], report.protocol["split"]) == (
        "held-out, part 1 of 2", "held-out, part 2 of 2",
    )  # fmt: skip
    assert search.protocol["seed"] == config.seed != report.protocol["seed"]
    for name in ("fid", "kid"):
        there, here = (
            bench.open(Stage(name, 8, 1), replace(config, seed=seed), part=part).protocol
            for seed, part in ((config.seed, SEARCH), (config.report_seed, REPORT))
        )
        assert (there["split"], here["split"]) == ("train", "held-out")
        assert (there["reference_n"], here["reference_n"]) == (1438, 359)
        assert there["seed"] != here["seed"]


def test_the_reference_of_eval_is_that_of_the_report_where_there_is_one(
    inputs: Inputs, image_folder: Path
) -> None:
    bench = open_bench(inputs, reference=str(image_folder))
    there, here = (
        bench.open(Stage("fid", 8, 1), MergeConfig(steps=2), part=part).protocol
        for part in (SEARCH, REPORT)
    )
    assert there["reference"] == "digits"
    assert (here["reference"], here["reference_n"]) == (str(image_folder), 10)
