"""Jobs: what rows share, what a change makes anew, and what is told before anything runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tiny_base

from deme_cli.comparison.jobs import Job
from deme_cli.comparison.plan import MeasurePlan, Plan, RowPlan, read_plan
from deme_cli.comparison.stage import Stage, jobs_of, open_stage, slug
from deme_cli.config import FinetuneConfig, MergeConfig
from deme_cli.errors import ConfigError, MissingError
from deme_cli.run_file import RunFile

TABLES = {
    "data": {"source": "digits"},
    "finetune": {"batch_size": 4, "lr": 1e-3},
    "sample": {"steps": 2},
    "eval": {"fid": "digits", "num": 6},
}
ROWS = (
    RowPlan("Before", "base"),
    RowPlan("Plain", "finetune"),
    RowPlan("Ensemble", "ensemble", 4),
    RowPlan("Merged", "merged", 4),
)
PLAN = Plan("Four rows", ROWS, tables=TABLES, seeds=[0, 7], updates=80)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_tiny_base(path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(
    base: Path, plan: Plan = PLAN, run: Mapping[str, Any] | None = None, **more: Any
) -> Stage:
    return open_stage(plan, RunFile(tables=run or {}), Path("out"), base=base, **more)


def folders(stage: Stage) -> dict[str, tuple[set[Path], set[Path]]]:
    """Of every row its training and its result folders."""
    return {
        name: ({job.needs.folder for job in row.values() if job.needs},
               {job.folder for job in row.values()})
        for name, row in jobs_of(stage).items()
    }  # fmt: skip


def with_row(name: str, **changes: Any) -> Plan:
    """The plan with one row changed."""
    rows = [replace(one, **changes) if one.name == name else one for one in PLAN.rows]
    return replace(PLAN, rows=tuple(rows))


def trained(job: Job) -> dict[str, Any]:
    return job.needs.task["tables"]["finetune"]


def test_rows_of_the_same_settings_share_one_training_and_the_base_has_none(base: Path) -> None:
    found = folders(opened(base))
    assert found["Ensemble"][0] == found["Merged"][0]
    assert found["Ensemble"][0].isdisjoint(found["Plain"][0])
    assert found["Before"][0] == set()
    assert len(set().union(*(results for _, results in found.values()))) == 1 + 3 * len(PLAN.seeds)


def test_every_row_that_trains_has_the_same_updates_shared_by_its_ranges(base: Path) -> None:
    rows = (ROWS[0], ROWS[1], *(RowPlan(f"{n}", "ensemble", n) for n in (1, 2, 4, 8, 16)))
    for name, row in jobs_of(opened(base, replace(PLAN, rows=rows))).items():
        for seed, job in row.items():
            if job.needs:
                n = len(job.needs.outputs)
                assert (n * trained(job)["steps"], job.needs.updates) == (80, 80)
                assert trained(job)["seed"] == seed
                assert n == int(name) if name != "Plain" else n == 1


@pytest.mark.parametrize(
    ("name", "changes", "trains_anew"),
    [
        ("Merged", {"finetune": {"p": 0.1}}, True),
        ("Plain", {"finetune": {"loss_weighting": "p2"}}, True),
        ("Merged", {"n": 2}, True),
        ("Merged", {"by": "log-snr"}, True),
        ("Merged", {"merge": {"search": "grid"}}, False),
        ("Merged", {"finetune": {"beta1": 0.95}}, None),  # the default, written out
    ],
)
def test_a_changed_row_is_made_anew_alone(
    base: Path, name: str, changes: dict[str, Any], trains_anew: bool | None
) -> None:
    before, after = folders(opened(base)), folders(opened(base, with_row(name, **changes)))
    assert before[name][0].isdisjoint(after[name][0]) == bool(trains_anew)
    assert before[name][1].isdisjoint(after[name][1]) == (trains_anew is not None)
    assert {k: v for k, v in before.items() if k != name} == {
        k: v for k, v in after.items() if k != name
    }


@pytest.mark.parametrize(
    ("tables", "options", "trains_anew", "measures_anew"),
    [
        ({}, {"device": "cuda:1"}, False, False),
        ({}, {"dtype": "bf16"}, True, True),
        ({"data": {"source": "digits", "horizontal_flip": True}}, {}, True, True),
        ({"finetune": {"batch_size": 4, "lr": 2e-3}}, {}, True, True),
        ({"finetune": {**TABLES["finetune"], "held_out": 9, "cache": "off"}}, {}, False, False),
        ({"sample": {"steps": 3}}, {}, False, True),
        ({"sample": {"steps": 2, "batch_size": 9}}, {}, False, False),
        ({"eval": {"fid": "digits", "num": 7}}, {}, False, True),
    ],
)
def test_what_decides_a_result_decides_where_it_lies(
    base: Path, tables: dict, options: dict, trains_anew: bool, measures_anew: bool
) -> None:
    changed = replace(PLAN, tables={**TABLES, **tables})
    before, after = folders(opened(base)), folders(opened(base, changed, **options))
    for name in ("Plain", "Ensemble", "Merged"):
        assert before[name][0].isdisjoint(after[name][0]) == trains_anew
        assert before[name][1].isdisjoint(after[name][1]) == measures_anew


def test_other_weights_are_another_base_and_a_further_seed_moves_nothing(
    base: Path, tmp_path: Path
) -> None:
    before = folders(opened(base))
    write_tiny_base(tmp_path / "base.safetensors", seed=1)
    other = folders(opened(tmp_path / "base.safetensors"))
    assert before["Before"][1].isdisjoint(other["Before"][1])
    after = folders(opened(base, replace(PLAN, seeds=[7, 0, 3])))
    for old, new in zip(before["Merged"], after["Merged"], strict=True):
        assert old < new
        assert {folder.name for folder in new - old} == {"seed-3"}


def test_a_row_wins_over_the_plan_and_the_plan_over_deme_toml(base: Path) -> None:
    run = {"finetune": {
        "lr": 1e-1, "batch_size": 11, "p": 0.1, "consistency": 2.0, "steps": 30,
        "loss_weighting": "p2", "weighting_gamma": 0.5, "multitask": "uw", "seed": 9,
        "snapshot_every": 3,
    }}  # fmt: skip
    own = RowPlan("Min-SNR", "finetune", 1, finetune={"loss_weighting": "min-snr", "lr": 1e-3})
    tables = {"data": {"source": "digits"}, "finetune": {"lr": 1e-2}, "eval": {"fid": "digits"}}
    plan = replace(PLAN, rows=(*ROWS, own), tables=tables, updates=None)
    stage = opened(base, plan, run)
    found = {row.name: stage.finetune(row) for row in plan.rows[1:]}
    assert (found["Min-SNR"].lr, found["Plain"].lr, found["Plain"].batch_size) == (1e-3, 1e-2, 11)
    assert (found["Plain"].p, found["Plain"].consistency, found["Merged"].p) == (0.0, 0.0, 0.1)
    assert (found["Plain"].projection, found["Merged"].projection) == ("none", "fold")
    assert (found["Plain"].loss_weighting, found["Plain"].multitask) == ("none", "none")
    assert (found["Min-SNR"].weighting_gamma, found["Min-SNR"].snapshot_every) == (None, None)
    assert set(stage.updates.values()) == {120}, "n times the steps"


def test_places_become_absolute_and_names_stay(base: Path, here: Path, image_folder: Path) -> None:
    (here / "elsewhere" / "beside").mkdir(parents=True)
    (here / "digits").mkdir()
    tables = {"finetune": {"cache": "beside"}, "eval": {"fid": "digits", "kid": "images"}}
    run = RunFile(here / "elsewhere", tables)
    measures = (MeasurePlan("mine", {}, {"fid": "images", "features": "digits"}),)
    plan = replace(PLAN, tables={"data": {"source": "digits"}}, measures=measures)
    stage = open_stage(plan, run, Path("out"), base=base)
    assert stage.folder == here / "out"
    assert stage.tables["data"]["source"] == "digits"
    assert stage.tables["finetune"]["cache"] == str((here / "elsewhere" / "beside").resolve())
    images = str(image_folder.resolve())
    assert stage.tables["eval"] == {"fid": "digits", "kid": images}
    assert (stage.measures[0]["eval"]["fid"], stage.measures[0]["eval"]["kid"]) == (images, images)


def test_a_job_says_all_that_is_done_there(base: Path) -> None:
    measures = (
        MeasurePlan("fast", {"steps": 3}, {"fid": "digits"}),
        MeasurePlan("many", {}, {"kid": "digits", "num": 9}),
    )
    plan = replace(with_row("Merged", merge={"search": "cmaes", "num": 5}), measures=measures)
    rows = jobs_of(opened(base, plan, device="cpu", dtype="bf16"))
    merged, ensemble, before = rows["Merged"][7], rows["Ensemble"][7], rows["Before"][None]
    assert (merged.task["device"], merged.task["dtype"]) == ("cpu", "bf16")
    names = [(merged.folder / model).resolve() for model in merged.task["models"]]
    assert names == [merged.needs.folder / f"ft_{i}of4.safetensors" for i in range(1, 5)]
    assert (merged.folder / merged.task["tables"]["model"]["base"]).resolve() == base
    settings = MergeConfig(**merged.task["tables"]["merge"])
    assert settings == MergeConfig(
        search="cmaes", num=5, report=False, seed=MergeConfig().seed + 7
    ), "another seed of the search for each training seed"
    assert "merge" not in ensemble.task["tables"]
    assert before.task["models"] == [os.path.relpath(base, before.folder)]
    for job in (merged, ensemble, before):
        assert job.task["measures"] == merged.task["measures"], "the same, whatever row"
        assert len(job.outputs) == 2
    told = [(one["sample"]["steps"], one["eval"]["num"], one["eval"].get("fid"))
            for one in merged.task["measures"]]  # fmt: skip
    assert told == [(3, 6, "digits"), (2, 9, None)]
    tables = merged.needs.task["tables"]
    assert tables["split"]["ranges"] == ["0:25", "25:50", "50:75", "75:100"]
    row = PLAN.rows[3]
    assert FinetuneConfig(**tables["finetune"]) == replace(opened(base).finetune(row), seed=7)


@pytest.mark.parametrize("name", ["table1", "table3", "sensitivity"])
def test_the_rows_of_a_shipped_plan_go_together(base: Path, name: str) -> None:
    plan = read_plan(name)
    stage = opened(base, replace(plan, tables={**plan.tables, "data": {"source": "digits"}}))
    rows = jobs_of(stage)
    assert len({slug(name) for name in rows}) == len(rows), "folders of their own"
    if name == "table1":
        found = {row.name: stage.finetune(row) for row in plan.rows[1:]}
        assert (found["P2 weighting"].loss_weighting, found["SNR+1"].loss_weighting) == (
            "p2", "snr+1",
        )  # fmt: skip
        assert (found["Min-SNR-5"].weighting_gamma, found["ANT-UW"].multitask) == (5.0, "uw")
        deme = found["DeMe (before merge)"]
        assert deme == found["DeMe (after merge)"]
        assert (deme.p, deme.consistency, deme.projection, deme.steps) == (0.3, 1.0, "fold", 20_000)


def plan_of(*rows: RowPlan, **changes: Any) -> Plan:
    return replace(PLAN, rows=(ROWS[0], *(rows or ROWS[1:])), **changes)


UW = {"multitask": "uw", "clusters": 2}


@pytest.mark.parametrize(
    ("plan", "error", "words"),
    [
        (plan_of(tables={}), ConfigError, "no training images"),
        (plan_of(tables={"data": {"source": "nowhere"}}), MissingError, "nowhere"),
        (plan_of(tables={**TABLES, "sample": {"steps": 0}}), ConfigError, "[sample] steps = 0"),
        (plan_of(RowPlan("SNR", "finetune", finetune={"loss_weighting": "snr2"})), ConfigError,
         "row 'SNR': loss_weighting = 'snr2': expected one of"),
        (plan_of(replace(ROWS[3], merge={"search": "all"})), ConfigError,
         "row 'Merged': [merge]: search"),
        (plan_of(replace(ROWS[3], merge={"coefficients": [1.0]})), ConfigError,
         "row 'Merged': [merge]: coefficients = [1.0]: expected 4, one a range"),
        (plan_of(measures=(MeasurePlan("few", {}, {"num": 0}),)), ConfigError,
         "measure 'few': num = 0"),
        (plan_of(replace(ROWS[3], n=101)), ConfigError, "101"),
        (plan_of(RowPlan("ANT", "ensemble", 4, finetune={**UW, "p": 0.3})), ConfigError,
         "row 'ANT': clusters divide each range, and p = 0.3 draws outside"),
        (plan_of(RowPlan("ANT", "finetune", finetune={**UW, "clusters": 5})), ConfigError,
         "row 'ANT': clusters = 5: expected from 2 to batch_size = 4"),
        (plan_of(RowPlan("ANT", "finetune", finetune={**UW, "cluster_by": "gradient"})),
         MissingError, "deme analyze gradients"),
        (plan_of(replace(ROWS[3], by="gradient")), MissingError, "deme analyze gradients"),
        (plan_of(updates=3), ConfigError, "row 'Ensemble': 4 ranges cannot share 3 updates"),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_refused_before_anything_runs(
    base: Path, here: Path, plan: Plan, error: type, words: str
) -> None:
    with pytest.raises(error) as caught:
        opened(base, plan)
    assert words in str(caught.value)
    assert not Path("out").exists()


def test_a_name_becomes_a_short_file_name() -> None:
    names = ("DeMe (after merge)", "../../etc", "日本")
    assert [slug(name) for name in names] == ["deme-after-merge", "etc", "row"]
    assert len(slug("x" * 400)) == 40
