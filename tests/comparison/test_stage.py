"""The stage: whose settings win, where paths lead, and what equal compute means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tiny_base

from deme_cli.comparison.jobs import (
    common_tables,
    flops_by_row,
    jobs_of,
    open_stage,
    projections_of,
    with_equal_compute,
)
from deme_cli.comparison.passes import PassCost, flops_per_update, passes_of
from deme_cli.comparison.plan import MeasurePlan, Plan, RowPlan
from deme_cli.config import FinetuneConfig
from deme_cli.errors import ConfigError, MissingError
from deme_cli.run_file import RunFile

PASSES = {
    "none": PassCost(forward=1000, backward=2000, base=1000),
    "fold": PassCost(forward=1100, backward=2200, base=1000),
    "block": PassCost(forward=1300, backward=2700, base=1000),
}
BEFORE = RowPlan("Before", "base", 1)
PLAIN = RowPlan("Plain", "finetune", 1)
MERGED = RowPlan("Merged", "merged", 4)
PLAN = Plan("Three rows", 4, (BEFORE, PLAIN, MERGED))
RUN = RunFile(Path("."), {"data": {"source": "digits"}})


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny base in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_tiny_base(tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def plan_with(*rows: RowPlan, **changes: Any) -> Plan:
    return replace(PLAN, rows=(BEFORE, PLAIN, *rows), **changes)


def test_a_row_wins_over_the_plan_and_the_plan_over_deme_toml(base: Path) -> None:
    run = RunFile(base.parent, {
        "data": {"source": "digits"},
        "finetune": {"lr": 1e-1, "batch_size": 11, "p": 0.1},
    })  # fmt: skip
    row = replace(MERGED, finetune={"lr": 1e-3})
    plan = plan_with(row, tables={"finetune": {"lr": 1e-2, "batch_size": 22}})
    stage = open_stage(plan, run, Path("out"), base=base)
    assert stage.tables["finetune"] == {"lr": 1e-2, "batch_size": 22, "p": 0.1}
    found = {jobs.row.name: jobs.finetune for jobs in jobs_of(plan, stage)}
    assert (found["Merged"].lr, found["Merged"].batch_size, found["Merged"].p) == (1e-3, 22, 0.1)
    assert found["Plain"].lr == 1e-2


@pytest.mark.parametrize(
    ("plan_updates", "steps", "total"), [(None, None, 80_000), (None, 30, 120), (50, 30, 50)]
)
def test_updates_are_those_of_the_plan_or_n_times_the_steps(
    base: Path, plan_updates: int | None, steps: int | None, total: int
) -> None:
    run = RunFile(Path("."), {**RUN.tables, "finetune": {"steps": steps} if steps else {}})
    stage = open_stage(replace(PLAN, updates=plan_updates), run, Path("out"), base=base)
    assert set(stage.updates.values()) == {total}


def test_paths_become_absolute_and_names_stay(base: Path, image_folder: Path) -> None:
    elsewhere = base.parent / "elsewhere"
    (elsewhere / "beside").mkdir(parents=True)
    run = RunFile(elsewhere, {
        "data": {"source": "images"},
        "finetune": {"cache": "beside"},
        "eval": {"fid": "digits", "kid": "cifar10"},
    })  # fmt: skip
    tables = common_tables(PLAN, run)
    assert tables["data"]["source"] == str(image_folder.resolve())
    assert tables["finetune"]["cache"] == str((elsewhere / "beside").resolve())
    assert tables["eval"] == {"fid": "digits", "kid": "cifar10"}


def test_paths_of_a_measure_become_absolute_too(base: Path, image_folder: Path) -> None:
    measure = MeasurePlan("mine", {}, {"fid": "images", "features": "digits"})
    plan = replace(PLAN, measures=(measure,))
    stage = open_stage(plan, RUN, Path("out"), base=base)
    for jobs in jobs_of(plan, stage):
        for job in jobs.results.values():
            assert f'fid = "{image_folder.resolve()}"' in job.files["measure-0.toml"]


def test_the_folder_and_the_base_are_found_from_anywhere(base: Path) -> None:
    stage = open_stage(PLAN, RUN, Path("out"), base=Path("base.safetensors"))
    assert (stage.folder, stage.base) == (base.parent / "out", base)


def test_a_row_has_ranges_of_its_own_number_and_kind(base: Path) -> None:
    by_snr = RowPlan("By SNR", "ensemble", 3, by="log-snr")
    plan = plan_with(MERGED, by_snr, RowPlan("Two", "ensemble", 2))
    stage = open_stage(plan, RUN, Path("out"), base=base)
    assert set(stage.ranges) == {("uniform", 1), ("uniform", 2), ("uniform", 4), ("log-snr", 3)}
    assert stage.ranges["uniform", 4] == ["0:25", "25:50", "50:75", "75:100"]
    spans = [one.split(":") for one in stage.ranges["log-snr", 3]]
    edges = [int(start) for start, _ in spans] + [int(spans[-1][1])]
    assert edges[0] == 0
    assert edges[-1] == 100
    assert edges == sorted(set(edges))
    assert [int(stop) for _, stop in spans] == edges[1:], "they cover [0, T) once"
    assert edges != [0, 33, 66, 100], "the noise decides, not the count"


def test_gradients_that_were_not_measured_are_missing(base: Path) -> None:
    plan = plan_with(replace(MERGED, by="gradient"))
    with pytest.raises(MissingError, match=r"gradients\.json.*deme analyze gradients"):
        open_stage(plan, RUN, Path("out"), base=base)
    clustered = {"multitask": "uw", "cluster_by": "gradient"}
    plan = plan_with(RowPlan("ANT", "finetune", 1, finetune=clustered))
    with pytest.raises(MissingError, match=r"gradients\.json.*deme analyze gradients"):
        open_stage(plan, RUN, Path("out"), base=base)


@pytest.mark.parametrize(
    ("plan", "run", "words"),
    [
        (PLAN, RunFile(Path("."), {}), "no training images"),
        (plan_with(tables={"data": {"source": ""}}), RUN, "no training images"),
        (plan_with(tables={"sample": {"steps": 0}}), RUN, "[sample] steps = 0"),
        (plan_with(tables={"eval": {"repeats": 0}}), RUN, "[eval] repeats = 0"),
        (
            plan_with(RowPlan("SNR", "finetune", 1, finetune={"loss_weighting": "snr2"})), RUN,
            "row 'SNR': loss_weighting = 'snr2': expected one of",
        ),
        (plan_with(replace(MERGED, merge={"search": "all"})), RUN, "row 'Merged': [merge] search"),
        (
            plan_with(measures=(MeasurePlan("few", {}, {"num": 0}),)), RUN,
            "num = 0: expected a number above 0",
        ),
        (
            plan_with(measures=(MeasurePlan("odd", {"sampler": "guess"}),)), RUN,
            "sampler = 'guess': expected one of",
        ),
        (plan_with(replace(MERGED, n=101)), RUN, "101"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_told_before_anything_runs(
    base: Path, plan: Plan, run: RunFile, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        open_stage(plan, run, Path("out"), base=base)
    assert words in str(caught.value)
    assert not Path("out").exists()


def test_without_a_base_it_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="deme split"):
        open_stage(PLAN, RUN, tmp_path, base=tmp_path / "none.safetensors")


ROWS = (
    MERGED,
    RowPlan("Bare", "ensemble", 8, finetune={"projection": "none", "consistency": 0.0}),
    RowPlan("Large batch", "finetune", 1, finetune={"batch_size": 128, "accumulation": 2}),
    RowPlan("PCGrad", "finetune", 1, finetune={"multitask": "pcgrad", "clusters": 3}),
    RowPlan("NashMTL", "finetune", 1, finetune={"multitask": "nashmtl", "clusters": 3}),
    RowPlan("Block", "merged", 2, finetune={"projection": "block"}),
)


def test_equal_compute_is_that_of_plain_finetuning_within_one_update(base: Path) -> None:
    plan = plan_with(*ROWS, updates=1000, budget="compute")
    stage = open_stage(plan, RUN, Path("out"), base=base)
    equal = with_equal_compute(plan, stage, PASSES)
    per_update = flops_by_row(plan, equal, PASSES)
    assert equal.updates["Plain"] == 1000
    budget = 1000 * per_update["Plain"]
    for row in plan.rows:
        if row.kind != "base":
            spent = equal.updates[row.name] * per_update[row.name]
            assert abs(spent - budget) <= per_update[row.name], row.name
    assert len(set(equal.updates.values())) > 4
    for jobs in jobs_of(plan, equal):
        for job in jobs.trainings.values():
            spent = job.updates * per_update[jobs.row.name]
            assert abs(spent - budget) <= jobs.row.n * per_update[jobs.row.name], jobs.row.name


def test_flops_of_a_row_are_those_of_its_own_settings(base: Path) -> None:
    plan = plan_with(*ROWS)
    flops = flops_by_row(plan, open_stage(plan, RUN, Path("out"), base=base), PASSES)
    assert set(flops) == {row.name for row in plan.rows} - {"Before"}
    assert flops["Plain"] == 64 * 3000, "no consistency: the frozen base is not asked"
    assert flops["Merged"] == 64 * 4300
    assert flops["Large batch"] == 4 * flops["Plain"]
    config = FinetuneConfig(**ROWS[-1].finetune)
    assert flops["Block"] == flops_per_update(config, PASSES["block"])
    assert set(projections_of(plan, RUN.tables)) == {"none", "fold", "block"}
    assert projections_of(plan, RUN.tables)[0] == "none"


def test_passes_are_counted_once_and_again_for_another_base(base: Path) -> None:
    stage = open_stage(PLAN, RUN, Path("out"), base=base)
    first = passes_of(stage, ["none", "fold"])
    assert 0 < first["none"].forward < first["fold"].forward
    assert first["none"].backward > first["none"].forward
    assert first["none"].base == first["none"].forward
    kept = stage.folder / "passes.json"
    document = json.loads(kept.read_text())
    document["passes"]["none"]["forward"] = 1
    kept.write_text(json.dumps(document))
    assert passes_of(stage, ["none"])["none"].forward == 1, "read, not counted"
    other = replace(stage, fingerprint="e" * 64)
    assert passes_of(other, ["none"])["none"] == first["none"]
    kept.write_text("{")
    assert passes_of(stage, ["none"])["none"] == first["none"]


def test_passes_are_counted_where_no_row_trains(base: Path) -> None:
    plan = replace(PLAN, rows=(BEFORE, replace(BEFORE, name="Again")))
    stage = open_stage(plan, RUN, Path("out"), base=base)
    assert passes_of(stage, projections_of(plan, stage.tables))["none"].forward > 0


def test_snapshots_of_a_row_do_not_stop_the_count(base: Path) -> None:
    plan = plan_with(replace(MERGED, finetune={"snapshot_every": 10}), updates=400)
    open_stage(plan, RUN, Path("out"), base=base)
    assert projections_of(plan, RUN.tables) == ["none", "fold"]


def test_a_weighting_in_deme_toml_makes_no_row_but_its_own(base: Path) -> None:
    weighed = {"loss_weighting": "p2", "weighting_gamma": 0.5, "multitask": "uw", "seed": 9}
    run = RunFile(base.parent, {"data": {"source": "digits"}, "finetune": weighed})
    own = RowPlan("Min-SNR", "finetune", 1, finetune={"loss_weighting": "min-snr"})
    stage = open_stage(plan_with(own), run, Path("out"), base=base)
    found = {jobs.row.name: jobs.finetune for jobs in jobs_of(plan_with(own), stage)}
    assert (found["Plain"].loss_weighting, found["Plain"].multitask) == ("none", "none")
    assert (found["Min-SNR"].loss_weighting, found["Min-SNR"].weighting_gamma) == ("min-snr", None)


def test_of_several_measures_each_has_its_own_reference(base: Path) -> None:
    run = RunFile(base.parent, {"data": {"source": "digits"}, "eval": {"fid": "digits", "num": 8}})
    measures = (MeasurePlan("a", {}, {"kid": "digits"}), MeasurePlan("b", {}, {"num": 9}))
    one = open_stage(replace(PLAN, measures=(MeasurePlan(),)), run, Path("out"), base=base)
    assert one.measures[0].eval == {"fid": "digits", "num": 8}
    two = open_stage(replace(PLAN, measures=measures), run, Path("out"), base=base)
    assert [one.eval for one in two.measures] == [{"num": 8, "kid": "digits"}, {"num": 9}]


def test_a_known_name_stays_one_beside_a_folder_of_that_name(base: Path) -> None:
    Path("digits").mkdir()
    Path("mine").mkdir()
    run = RunFile(Path("."), {"data": {"source": "digits"}, "eval": {"fid": "mine"}})
    tables = common_tables(PLAN, run)
    assert tables["data"]["source"] == "digits"
    assert tables["eval"]["fid"] == str(Path("mine").resolve())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (RowPlan("ANT", "ensemble", 4, finetune={"multitask": "uw", "p": 0.3}), "p = 0.3 draws"),
        (RowPlan("ANT", "finetune", 1, finetune={"multitask": "uw", "clusters": 2,
                                                 "batch_size": 1}), "clusters = 2"),
        (RowPlan("Merged", "merged", 4, merge={"coefficients": [1.0]}), "expected 4, one a range"),
    ],
)  # fmt: skip
def test_what_would_fail_after_training_is_refused_before(
    base: Path, row: RowPlan, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        open_stage(plan_with(row), RUN, Path("out"), base=base)
    assert str(caught.value).startswith(f"row {row.name!r}")
    assert words in str(caught.value)


def test_more_ranges_than_updates_are_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="4 ranges cannot share 3 updates"):
        open_stage(replace(PLAN, updates=3), RUN, Path("out"), base=base)
