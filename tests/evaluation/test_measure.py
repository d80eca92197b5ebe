"""The procedure: shared noise, pairing, resuming, finished images."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import collect_images

from deme_cli.artifacts import SamplesRecord, load_tensors, read_record, write_artifact
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.console import Step
from deme_cli.errors import ConfigError, NumericsError, Stopped
from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.frechet import RunningStatistics, Statistics, frechet_distance
from deme_cli.evaluation.measure import Measured, Metrics, measure_rows, summarise
from deme_cli.evaluation.references import Reference
from deme_cli.evaluation.rows import Row, open_rows, plan_rows

SAMPLE = SampleConfig(num=6, steps=2, batch_size=4)
CONFIG = EvalConfig(num=6, repeats=2, seed=7)
BASE = Path("base.safetensors")


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    features = np.random.default_rng(0).standard_normal((500, 64))
    statistics = Statistics(features.mean(axis=0), np.cov(features, rowvar=False), 500)
    reference = Reference("digits", "images", statistics=statistics)
    return Metrics(load_extractor("digits"), {"frechet_digits": reference})


def open_these(*arguments: str) -> list[Row]:
    return open_rows(plan_rows(arguments)[0], SAMPLE)


def run(rows: list[Row], metrics: Metrics, config: EvalConfig = CONFIG, **more) -> list[Measured]:
    return measure_rows(rows, metrics, {"any": {}}, config, SAMPLE, **more)


def test_a_figure_is_the_distance_of_the_images_of_its_seed_finished_or_drawn(
    run_folder: Path, metrics: Metrics
) -> None:
    """Equal models share their noise and differ by nothing; finished images are measured once."""
    (row,) = open_these(str(BASE))
    Path("same.safetensors").write_bytes(BASE.read_bytes())
    extractor, reference = metrics.extractor, metrics.references["frechet_digits"].statistics
    expected = []
    for repeat in range(2):
        sample = replace(SAMPLE, seed=7 + repeat)
        images = collect_images(row.experts, sample, conditioning=row.conditioning)
        running = RunningStatistics()
        running.add(extractor.features(images))
        found = running.statistics()
        expected.append(frechet_distance(found.mu, found.sigma, reference.mu, reference.sigma))
        if not repeat:
            record = SamplesRecord(protocol=row.card)
            write_artifact(Path("drawn.safetensors"), {"images": images}, record)
    told: list[Step] = []
    rows = open_these(str(BASE), "same.safetensors", "drawn.safetensors")
    measured = run(rows, metrics, progress=told.append)
    assert [(m.row, m.repeat, m.n) for m in measured] == [
        ("base", 0, 6), ("same", 0, 6), ("drawn", 0, 6), ("base", 1, 6), ("same", 1, 6),
    ]  # fmt: skip
    done = [step.done for step in told]
    assert done == sorted(done)
    assert (told[-1].done, told[-1].total) == (30, 30)
    figures = {name: row["frechet_digits"] for name, row in summarise(measured).items()}
    assert figures["base"].values == pytest.approx(expected, rel=1e-6)
    assert figures["base"].sd > 0
    assert (figures["same"].difference.mean, figures["same"].difference.sd) == (0, 0)
    assert figures["drawn"].values == pytest.approx(expected[:1], rel=1e-6)
    assert figures["base"].difference is figures["drawn"].difference is None


def test_a_stopped_run_goes_on_where_it_was(run_folder: Path, metrics: Metrics) -> None:
    rows = open_these(str(BASE), "ft_1of4.safetensors")
    whole = run(rows, metrics)
    assert not list(Path().glob(".deme-eval*"))

    def stop(step: Step) -> None:
        if step.detail == "base, repeat 2":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="2 measurements are kept") as raised:
        run(rows, metrics, progress=stop)
    assert raised.value.exit_code == 75
    (kept,) = Path().glob(".deme-eval*")
    told: list[Step] = []
    assert run(rows, metrics, progress=told.append) == whole
    assert {step.detail for step in told} == {"base, repeat 2", "ft_1of4, repeat 2"}
    kept.write_text("[{")  # as a run that was killed leaves it
    assert run(rows, metrics) == whole
    assert not kept.exists()


def test_what_has_no_figure_ends_the_run(run_folder: Path, metrics: Metrics) -> None:
    weights = load_tensors(BASE)
    broken = {name: tensor * float("nan") for name, tensor in weights.items()}
    write_artifact(Path("broken.safetensors"), broken, read_record(BASE))
    with pytest.raises(NumericsError, match="not finite"):
        run(open_these("broken.safetensors"), metrics)
    record = SamplesRecord(protocol={})
    write_artifact(Path("one.safetensors"), {"images": np.zeros((1, 8, 8, 1), "u1")}, record)
    with pytest.raises(ConfigError, match="one: a covariance needs at least 2 images, there are 1"):
        run(open_these("one.safetensors"), metrics)


def test_differences_are_taken_within_each_repeat() -> None:
    details = {"fid": {"truncated": 2}}
    first = [Measured("a", r, 9, {"fid": v}, details) for r, v in enumerate([4.0, 6.0, 3.0])]
    second = [Measured("b", r, 9, {"fid": value}) for r, value in enumerate([3.5, 5.4, 2.6])]
    figures = summarise([*first, *second])
    shown = figures["a"]["fid"].document
    assert (shown["truncated"], shown["n"], shown["repeats"]) == (2, 9, 3)
    assert shown["sd"] == pytest.approx(np.std([4, 6, 3], ddof=1))
    to, *numbers = asdict(figures["b"]["fid"].difference).values()
    half = 4.302653 * 0.1 / 3**0.5  # Student's t with 2 degrees of freedom
    expected = [-0.5, 0.1, -0.5 - half, -0.5 + half]
    assert (to, [*numbers[:2], *numbers[2]]) == ("a", pytest.approx(expected, rel=1e-6))
