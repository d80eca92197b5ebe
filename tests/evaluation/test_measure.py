"""The procedure: shared noise, pairing, resuming, finished images."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deme_cli.artifacts import SamplesRecord, load_tensors, read_record, write_artifact
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import NumericsError, Stopped
from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.frechet import RunningStatistics, Statistics, frechet_distance
from deme_cli.evaluation.measure import (
    Measured,
    MeasureProgress,
    Metrics,
    Unfinished,
    measure_rows,
    summarise,
    total_images,
)
from deme_cli.evaluation.references import Reference
from deme_cli.evaluation.rows import Row, open_rows, plan_rows
from deme_cli.sampling.sampler import collect_images

SAMPLE = SampleConfig(num=12, steps=3, batch_size=5)
CONFIG = EvalConfig(num=12, repeats=2, seed=7)


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((500, 64))
    statistics = Statistics(features.mean(axis=0), np.cov(features, rowvar=False), 500)
    reference = Reference("digits", "images", statistics=statistics)
    return Metrics(load_extractor("digits"), {"frechet_digits": reference})


def open_these(*arguments: str) -> list[Row]:
    return open_rows(plan_rows(arguments)[0], SAMPLE)


def run(rows: list[Row], metrics: Metrics, config: EvalConfig = CONFIG) -> list[Measured]:
    unfinished = Unfinished(Path("."), "x")
    records = measure_rows(rows, metrics, sample=SAMPLE, config=config, unfinished=unfinished)
    return [record for record in records if isinstance(record, Measured)]


def test_a_figure_is_the_distance_of_the_images_of_its_seed(
    run_folder: Path, metrics: Metrics
) -> None:
    rows = open_these("base.safetensors")
    measured = run(rows, metrics)
    assert [(m.repeat, m.n) for m in measured] == [(0, 12), (1, 12)]
    extractor, reference = metrics.extractor, metrics.references["frechet_digits"].statistics
    assert extractor is not None
    assert reference is not None
    for repeat, record in enumerate(measured):
        sample = replace(SAMPLE, seed=7 + repeat)
        images = collect_images(rows[0].experts, sample, conditioning=rows[0].conditioning)
        running = RunningStatistics()
        running.add(extractor.features(images))
        found = running.statistics()
        expected = frechet_distance(found.mu, found.sigma, reference.mu, reference.sigma)
        assert record.values["frechet_digits"] == pytest.approx(expected, rel=1e-6)


def test_equal_models_share_their_noise_and_differ_by_nothing(
    run_folder: Path, metrics: Metrics
) -> None:
    Path("same.safetensors").write_bytes(Path("base.safetensors").read_bytes())
    figures = summarise(run(open_these("base.safetensors", "same.safetensors"), metrics))
    difference = figures["same"]["frechet_digits"].difference
    assert difference is not None
    assert (difference.mean, difference.sd) == (0, 0)
    assert figures["base"]["frechet_digits"].difference is None
    assert figures["base"]["frechet_digits"].sd > 0


def test_finished_images_are_measured_once_and_as_they_are(
    run_folder: Path, metrics: Metrics
) -> None:
    rows = open_these("base.safetensors")
    images = collect_images(
        rows[0].experts, replace(SAMPLE, seed=7), conditioning=rows[0].conditioning
    )
    write_artifact(
        Path("drawn.safetensors"), {"images": images}, SamplesRecord(protocol=rows[0].card)
    )
    rows = open_these("base.safetensors", "drawn.safetensors")
    assert total_images(rows, CONFIG) == 36
    figures = summarise(run(rows, metrics))
    drawn, base = figures["drawn"]["frechet_digits"], figures["base"]["frechet_digits"]
    assert len(drawn.values) == 1
    assert drawn.difference is None
    assert drawn.value == pytest.approx(base.values[0], rel=1e-6)


def test_progress_reaches_the_number_of_images(run_folder: Path, metrics: Metrics) -> None:
    records = list(
        measure_rows(
            open_these("base.safetensors"), metrics, sample=SAMPLE,
            config=replace(CONFIG, repeats=1), unfinished=Unfinished(Path("."), "x"),
        )
    )  # fmt: skip
    done = [record.done for record in records if isinstance(record, MeasureProgress)]
    assert done == sorted(done)
    assert done[-1] == 12


def test_a_stopped_run_goes_on_where_it_was(run_folder: Path, metrics: Metrics) -> None:
    rows = open_these("base.safetensors", "ft_1of4.safetensors")
    whole = run(rows, metrics)
    arguments = {"sample": SAMPLE, "config": CONFIG}
    records = measure_rows(rows, metrics, unfinished=Unfinished(Path("."), "y"), **arguments)
    kept = 0
    with pytest.raises(Stopped, match="2 measurements are kept") as raised:  # noqa: PT012
        for record in records:
            kept += isinstance(record, Measured)
            if kept == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert raised.value.exit_code == 75
    unfinished = Unfinished(Path("."), "y")
    assert [unfinished.find("base", 0), unfinished.find("ft_1of4", 0)] == whole[:2]
    assert unfinished.find("base", 1) is None
    assert Unfinished(Path("."), "another run").find("base", 0) is None
    records = measure_rows(rows, metrics, unfinished=unfinished, **arguments)
    assert [record for record in records if isinstance(record, Measured)] == whole
    assert not unfinished.path.exists()
    unfinished.path.write_text("[{")  # as a run that was killed leaves it
    assert Unfinished(Path("."), "y").find("base", 0) is None


def test_weights_that_are_not_finite_end_the_run(run_folder: Path, metrics: Metrics) -> None:
    weights = load_tensors(Path("base.safetensors"))
    broken = {name: tensor * float("nan") for name, tensor in weights.items()}
    write_artifact(Path("broken.safetensors"), broken, read_record(Path("base.safetensors")))
    with pytest.raises(NumericsError, match="not finite"):
        run(open_these("broken.safetensors"), metrics)


def test_differences_are_taken_within_each_repeat() -> None:
    first = [Measured("a", r, 9, {"fid": value}) for r, value in enumerate([4.0, 6.0, 3.0])]
    second = [Measured("b", r, 9, {"fid": value}) for r, value in enumerate([3.5, 5.4, 2.6])]
    figures = summarise([*first, *second])
    assert figures["a"]["fid"].sd == pytest.approx(np.std([4, 6, 3], ddof=1))
    difference = figures["b"]["fid"].difference
    assert difference is not None
    assert difference.to == "a"
    assert difference.mean == pytest.approx(-0.5)
    assert difference.sd == pytest.approx(0.1)
    half = 4.302653 * 0.1 / 3**0.5  # Student's t with 2 degrees of freedom
    assert difference.interval == pytest.approx((-0.5 - half, -0.5 + half), rel=1e-6)


def test_what_else_a_figure_tells_is_that_of_the_first_repeat() -> None:
    details = {"clip_score": {"truncated": 2, "model": "tiny"}}
    figures = summarise([Measured("a", r, 9, {"clip_score": 20.0}, details) for r in (0, 1)])
    shown = figures["a"]["clip_score"].document
    assert (shown["truncated"], shown["model"], shown["repeats"]) == (2, "tiny", 2)
