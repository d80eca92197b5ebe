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
from deme_cli.errors import ArtifactError, NumericsError, Stopped
from deme_cli.evaluation.evaluate import evaluate_rows, total_images
from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.frechet import RunningStatistics, Statistics, frechet_distance
from deme_cli.evaluation.ledger import Ledger
from deme_cli.evaluation.measure import Measured, MeasureProgress
from deme_cli.evaluation.meters import Instruments
from deme_cli.evaluation.references import Reference
from deme_cli.evaluation.row_plans import plan_rows
from deme_cli.evaluation.rows import Row, RowOpener, open_rows
from deme_cli.evaluation.summary import summarise
from deme_cli.evaluation.targets import Target
from deme_cli.sampling.sampler import collect_images

SAMPLE = SampleConfig(num=12, steps=3, batch_size=5)
CONFIG = EvalConfig(num=12, repeats=2, seed=7)
REFERENCE = Reference("digits", "images")


@pytest.fixture(scope="module")
def instruments() -> Instruments:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((500, 64))
    statistics = Statistics(features.mean(axis=0), np.cov(features, rowvar=False), 500)
    target = Target("frechet_digits", REFERENCE, statistics)
    return Instruments(load_extractor("digits"), [target])


def open_these(*arguments: str) -> list[Row]:
    return open_rows(plan_rows(arguments).plans, RowOpener(SAMPLE), CONFIG)


def run(rows: list[Row], instruments: Instruments, config: EvalConfig = CONFIG) -> list[Measured]:
    records = evaluate_rows(
        rows, instruments, sample=SAMPLE, config=config, ledger=Ledger(Path("."), "x")
    )
    return [record for record in records if isinstance(record, Measured)]


def test_a_figure_is_the_distance_of_the_images_of_its_seed(
    run_folder: Path, instruments: Instruments
) -> None:
    rows = open_these("base.safetensors")
    measured = run(rows, instruments)
    assert [(m.repeat, m.n) for m in measured] == [(0, 12), (1, 12)]
    extractor, reference = instruments.extractor, instruments.targets[0].statistics
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
    run_folder: Path, instruments: Instruments
) -> None:
    Path("same.safetensors").write_bytes(Path("base.safetensors").read_bytes())
    figures = summarise(run(open_these("base.safetensors", "same.safetensors"), instruments))
    difference = figures["same"]["frechet_digits"].difference
    assert difference is not None
    assert (difference.mean, difference.sd) == (0, 0)
    assert figures["base"]["frechet_digits"].difference is None
    assert figures["base"]["frechet_digits"].sd > 0


def test_finished_images_are_measured_once_and_as_they_are(
    run_folder: Path, instruments: Instruments
) -> None:
    rows = open_these("base.safetensors")
    drawing = replace(SAMPLE, seed=7)
    images = collect_images(rows[0].experts, drawing, conditioning=rows[0].conditioning)
    write_artifact(
        Path("drawn.safetensors"), {"images": images}, SamplesRecord(protocol=rows[0].card)
    )
    rows = open_these("base.safetensors", "drawn.safetensors")
    assert total_images(rows, CONFIG) == 36
    figures = summarise(run(rows, instruments))
    drawn, base = figures["drawn"]["frechet_digits"], figures["base"]["frechet_digits"]
    assert len(drawn.values) == 1
    assert drawn.difference is None
    assert drawn.value == pytest.approx(base.values[0], rel=1e-6)


def test_an_ensemble_is_one_row_and_carries_all_fingerprints(run_folder: Path) -> None:
    paths = [f"ft_{index}of4.safetensors" for index in range(1, 5)]
    (row,) = open_these(*paths)
    assert row.card["model"] == "ensemble"
    assert row.card["fingerprints"] == [read_record(Path(path)).fingerprint for path in paths]


def test_progress_reaches_the_number_of_images(run_folder: Path, instruments: Instruments) -> None:
    records = list(
        evaluate_rows(
            open_these("base.safetensors"), instruments, sample=SAMPLE,
            config=replace(CONFIG, repeats=1), ledger=Ledger(Path("."), "x"),
        )
    )  # fmt: skip
    done = [record.done for record in records if isinstance(record, MeasureProgress)]
    assert done == sorted(done)
    assert done[-1] == 12


def test_a_stopped_run_goes_on_where_it_was(run_folder: Path, instruments: Instruments) -> None:
    rows = open_these("base.safetensors", "ft_1of4.safetensors")
    whole = run(rows, instruments)
    arguments = {"sample": SAMPLE, "config": CONFIG}
    records = evaluate_rows(rows, instruments, ledger=Ledger(Path("."), "y"), **arguments)
    kept = 0
    with pytest.raises(Stopped, match="2 measurements are kept") as raised:  # noqa: PT012
        for record in records:
            kept += isinstance(record, Measured)
            if kept == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert raised.value.exit_code == 75
    ledger = Ledger(Path("."), "y")
    assert [ledger.find("base", 0), ledger.find("ft_1of4", 0)] == whole[:2]
    assert ledger.find("base", 1) is None
    assert Ledger(Path("."), "another run").find("base", 0) is None
    records = evaluate_rows(rows, instruments, ledger=ledger, **arguments)
    assert [record for record in records if isinstance(record, Measured)] == whole
    assert not ledger.path.exists()


def test_a_broken_ledger_is_measured_again(run_folder: Path) -> None:
    ledger = Ledger(Path("."), "x")
    ledger.path.write_text("[{")
    assert Ledger(Path("."), "x").find("base", 0) is None


def test_rows_of_different_sizes_are_refused(run_folder: Path) -> None:
    from conftest import write_tiny_base

    write_tiny_base(Path("large.safetensors"), sample_size=16)
    with pytest.raises(ArtifactError, match="large has 16x16 images, base 8x8"):
        open_these("base.safetensors", "large.safetensors")


def test_weights_that_are_not_finite_end_the_run(
    run_folder: Path, instruments: Instruments
) -> None:
    weights = load_tensors(Path("base.safetensors"))
    broken = {name: tensor * float("nan") for name, tensor in weights.items()}
    write_artifact(Path("broken.safetensors"), broken, read_record(Path("base.safetensors")))
    with pytest.raises(NumericsError, match="not finite"):
        run(open_these("broken.safetensors"), instruments)


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


def test_samples_need_a_prompt_and_a_class_for_every_image(run_folder: Path) -> None:
    images = np.zeros((3, 8, 8, 1), np.uint8)
    for changes, words in (({"prompts": ["a"]}, "3 prompts"), ({"classes": [1, 2]}, "3 cl")):
        record = SamplesRecord(protocol={}, **changes)
        write_artifact(Path("drawn.safetensors"), {"images": images}, record)
        with pytest.raises(ArtifactError, match=f"expected {words}"):
            open_these("drawn.safetensors")


def test_a_folder_whose_card_is_no_table_is_refused(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image_folder.parent)
    (image_folder / "samples.json").write_text('{"protocol": null}')
    with pytest.raises(ArtifactError, match="expected a table under protocol, found None"):
        open_these(image_folder.name)


def test_models_of_one_base_share_their_scene(run_folder: Path) -> None:
    rows = open_these("base.safetensors", "ft_1of4.safetensors")
    assert rows[0].conditioning is rows[1].conditioning


def test_a_standard_error_over_repeats_is_that_of_all_their_images() -> None:
    records = [
        Measured("a", r, 100, {"accuracy": value}, {"accuracy": {"standard_error": error}})
        for r, (value, error) in enumerate([(90.0, 3.0), (80.0, 4.0)])
    ]
    figure = summarise(records)["a"]["accuracy"]
    assert figure.details["standard_error"] == pytest.approx(2.5)  # sqrt(3^2 + 4^2) / 2
    assert figure.document["standard_error"] == pytest.approx(2.5)


def test_what_else_a_figure_tells_is_that_of_the_first_repeat() -> None:
    details = {"clip_score": {"truncated": 2, "model": "tiny"}}
    figures = summarise([Measured("a", r, 9, {"clip_score": 20.0}, details) for r in (0, 1)])
    shown = figures["a"]["clip_score"].document
    assert (shown["truncated"], shown["model"], shown["repeats"]) == (2, "tiny", 2)
