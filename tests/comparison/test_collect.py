"""What jobs have left becomes the table: nothing lost, nothing made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_SCHEDULER, write_tiny_base

from deme_cli.artifacts import MergedRecord, load_tensors, write_artifact
from deme_cli.comparison.compare import collect
from deme_cli.comparison.figures import Column, Comparison, SearchCost
from deme_cli.comparison.jobs import (
    DONE_NAME,
    FAILED_NAME,
    Failure,
    Job,
    RowJobs,
    Stage,
    jobs_of,
)
from deme_cli.comparison.plan import MeasurePlan, Plan, Published, RowPlan
from deme_cli.errors import ArtifactError

CARD = {"sampler": "ddim", "steps": 2, "spacing": "leading", "eta": 0.0, "clip_sample": True,
        "dtype": "fp32", "forwards": 2, "seed": 0, "num": 6}  # fmt: skip
FID = Column("fid")
TABLES = {
    "data": {"source": "digits"},
    "finetune": {"batch_size": 4, "accumulation": 2},
    "eval": {"fid": "cifar10", "num": 6, "repeats": 2},
}
PLAN = Plan(
    "Three rows",
    2,
    (
        RowPlan("Before", "base", 1, published=(4.42,)),
        RowPlan("Weighted", "finetune", 1, finetune={"loss_weighting": "p2"}),
        RowPlan("Merged", "merged", 2, merge={"search": "grid"}),
    ),
    seeds=(0, 7),
    published=Published("them", ("CIFAR10",)),
)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(
        folder=tmp_path,
        base=tmp_path / "base.safetensors",
        fingerprint="f" * 64,
        tables=TABLES,
        ranges={("uniform", 1): ["0:100"], ("uniform", 2): ["0:50", "50:100"]},
        updates={row.name: 40 for row in PLAN.rows},
    )


def finish(job: Job, *measures: Mapping[str, list[float]], done: bool = True) -> None:
    """Leave behind what `deme eval` and the runner do: values by metric, one dict a measure."""
    job.folder.mkdir(parents=True, exist_ok=True)
    for index, values in enumerate(measures):
        metrics = {
            name: {"value": sum(found) / len(found), "n": 9, "values": found}
            for name, found in values.items()
        }
        row = {"name": "merged", "kind": "merged", "metrics": metrics, "protocol": CARD}
        document = {"schema_version": 1, "rows": [row]}
        (job.folder / f"measure-{index}.json").write_text(json.dumps(document))
    if done:
        (job.folder / DONE_NAME).write_text('{"seconds": 1.0}')


def draw_curves(job: Job, *records: tuple[int, float]) -> None:
    """Curves of the job's ranges, all alike: (step, images per second)."""
    job.folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "images_per_second": rate}) for step, rate in records]
    for curve in job.curves:
        curve.write_text("".join(f"{line}\n" for line in lines))


def gathered(
    rows: list[RowJobs],
    plan: Plan = PLAN,
    *,
    flops: Mapping[str, float] | None = None,
) -> Comparison:
    return collect(plan, rows, flops=flops or {})


def fail(job: Job, failure: Failure) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / FAILED_NAME).write_text(json.dumps(asdict(failure)))


def all_done(rows: list[RowJobs]) -> list[RowJobs]:
    """Every job finished; the values tell row, seed and repeat."""
    for number, jobs in enumerate(rows):
        for seed, job in jobs.results.items():
            finish(job, {"fid": [number + (seed or 0) / 10 + r / 100 for r in (0, 1)]})
        for training in jobs.trainings.values():
            draw_curves(training, (10, 8.0), (training.updates // jobs.row.n, 4.0))
    return rows


def test_every_value_comes_back_by_row_seed_and_repeat(stage: Stage) -> None:
    found = gathered(all_done(jobs_of(PLAN, stage)))
    assert found.columns == (FID,)
    assert [row.name for row in found.rows] == ["Before", "Weighted", "Merged"]
    values = {(row.name, one.seed): one.values[FID] for row in found.rows for one in row.results}
    assert values == {
        ("Before", None): (0.0, 0.01),
        ("Weighted", 0): (1.0, 1.01),
        ("Weighted", 7): (1.7, 1.71),
        ("Merged", 0): (2.0, 2.01),
        ("Merged", 7): (2.7, 2.71),
    }
    assert [(row.pending, row.failures) for row in found.rows] == [(0, ())] * 3


def test_every_measure_has_columns_of_its_own(stage: Stage) -> None:
    plan = replace(PLAN, measures=(MeasurePlan("coco"), MeasurePlan("parti")))
    rows = jobs_of(plan, stage)
    finish(rows[0].results[None], {"fid": [1.0], "clip_score": [0.3]}, {"clip_score": [0.2]})
    found = gathered(rows, plan)
    assert found.columns == (
        Column("fid", "coco"),
        Column("clip_score", "coco", lower_is_better=False),
        Column("clip_score", "parti", lower_is_better=False),
    )
    assert found.rows[0].results[0].values[found.columns[2]] == (0.2,)
    assert found.cards == {key: {**CARD, "num": 9} for key in ("coco", "parti")}


def test_what_is_not_done_is_pending_or_has_failed(stage: Stage) -> None:
    rows = jobs_of(PLAN, stage)
    _, weighted, merged = rows
    finish(weighted.results[7], {"fid": [1.0, 2.0]})
    draw_curves(weighted.trainings[7], (40, 4.0))
    finish(merged.results[0], {"fid": [1.0, 2.0]}, done=False)  # measured, but under way
    fail(merged.trainings[7], Failure("the loss is nan", 5))
    found = {row.name: row for row in gathered(rows).rows}
    assert [one.seed for one in found["Weighted"].results] == [7]
    assert (found["Weighted"].pending, found["Weighted"].failures) == (1, ())
    assert found["Merged"].results == ()
    assert (found["Merged"].pending, found["Merged"].failures) == (1, ("the loss is nan",))
    assert (found["Before"].pending, found["Before"].results) == (1, ())


def test_every_seed_that_failed_tells_why(stage: Stage) -> None:
    rows = jobs_of(PLAN, stage)
    for job in rows[1].results.values():
        fail(job, Failure("no disk", 3))
    weighted = gathered(rows).rows[1]
    assert (weighted.failures, weighted.pending) == (("no disk", "no disk"), 0)


def test_a_table_of_nothing_is_a_table(stage: Stage) -> None:
    found = gathered(jobs_of(PLAN, stage))
    assert (found.columns, found.cards) == ((), {})
    assert [row.pending for row in found.rows] == [1, 2, 2]
    assert found.published == PLAN.published
    assert found.rows[0].published == (4.42,)


def test_seconds_of_training_are_those_of_the_curves_of_all_ranges(stage: Stage) -> None:
    found = {row.name: row for row in gathered(all_done(jobs_of(PLAN, stage))).rows}
    # 8 images an update: 10 updates at 8 images a second, then the rest at 4
    assert {one.seconds for one in found["Weighted"].results} == {10.0 + 30 * 8 / 4}
    assert {one.seconds for one in found["Merged"].results} == {2 * (10.0 + 10 * 8 / 4)}
    assert found["Before"].results[0].seconds == 0.0


def test_costs_are_in_total_whatever_the_number_of_ranges(stage: Stage) -> None:
    flops = {"Weighted": 3e9, "Merged": 5e9}
    rows = gathered(jobs_of(PLAN, stage), flops=flops).rows
    found = [(row.updates, row.images, row.flops) for row in rows]
    assert found == [(0, 0, 0.0), (40, 320, 40 * 3e9), (40, 320, 40 * 5e9)]


def search_record(*rungs: tuple[str, int, int]) -> dict[str, Any]:
    """As a search leaves it: rungs are (objective, num, evaluations)."""
    return {
        "evaluations": sum(count for _, _, count in rungs),
        "seconds": 12.5,
        "objective": rungs[-1][0],
        "rungs": [
            {"objective": name, "num": num, "evaluations": count} for name, num, count in rungs
        ],
    }


def merge(job: Job, base: Path, search: dict[str, Any] | None) -> None:
    base_record = write_tiny_base(base)
    known = {name: asdict(base_record)[name] for name in ("source", "model_config")}
    record = MergedRecord(
        **known, scheduler_config=TINY_SCHEDULER, num_train_timesteps=100,
        base=base_record.fingerprint, parents=[], coefficients=[0.5, 0.5], method="linear",
        projection="none", search=search,
    )  # fmt: skip
    job.folder.mkdir(parents=True, exist_ok=True)
    write_artifact(job.folder / "merged.safetensors", load_tensors(base), record)


def test_the_cost_of_a_search_is_that_of_the_merged_record(stage: Stage) -> None:
    rows = all_done(jobs_of(PLAN, stage))
    searched = search_record(("loss", 64, 16), ("kid", 1000, 8), ("fid", 5000, 2))
    merge(rows[2].results[0], stage.base, searched)
    merge(rows[2].results[7], stage.base, None)
    found = gathered(rows).rows
    costs = {one.seed: one.search for one in found[2].results}
    assert costs == {0: SearchCost(26, 8 * 1000 + 2 * 5000, 12.5, "fid"), 7: None}
    assert {one.search for row in found[:2] for one in row.results} == {None}
    assert {one.coefficients for one in found[2].results} == {(0.5, 0.5)}
    assert {one.coefficients for row in found[:2] for one in row.results} == {()}


def test_rows_measured_against_other_images_are_not_put_into_one_table(stage: Stage) -> None:
    rows = all_done(jobs_of(PLAN, stage))
    path = rows[1].results[7].folder / "measure-0.json"
    document = json.loads(path.read_text())
    document["rows"][0]["protocol"] = {**CARD, "references": {"fid": {"n": 200}}}
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"references.*remove its folder"):
        gathered(rows)


def test_a_setting_of_a_row_is_told_whatever_it_is(stage: Stage) -> None:
    odd = RowPlan("Odd", "finetune", 1, finetune={"lr": 0.5, "loss_weighting": "p2",
                                                  "weighting_k": 2.0})  # fmt: skip
    plan = replace(PLAN, rows=(*PLAN.rows, odd))
    stage = replace(stage, updates={row.name: 40 for row in plan.rows})
    found = gathered(jobs_of(plan, stage), plan).rows[-1].settings
    assert found == {"lr": 0.5, "loss_weighting": "p2", "weighting_k": 2.0}


def test_a_row_tells_what_sets_it_apart_from_plain_finetuning(stage: Stage) -> None:
    plan = replace(PLAN, rows=(
        *PLAN.rows,
        RowPlan("Plain", "finetune", 1),
        RowPlan("ANT", "finetune", 1, finetune={"multitask": "uw", "clusters": 4}),
        RowPlan("By SNR", "ensemble", 2, by="log-snr"),
    ))  # fmt: skip
    stage = replace(
        stage,
        ranges={**stage.ranges, ("log-snr", 2): ["0:10", "10:100"]},
        updates={row.name: 40 for row in plan.rows},
    )
    found = {row.name: row.settings for row in gathered(jobs_of(plan, stage), plan).rows}
    assert found["Before"] == found["Plain"] == {}
    assert found["Weighted"] == {"loss_weighting": "p2"}
    tasks = {"cluster_by": "uniform", "multitask_lr": 0.025, "multitask_every": 25}
    assert found["ANT"] == {"multitask": "uw", "clusters": 4, **tasks}
    deme = {"p": 0.3, "consistency": 1.0, "projection": "fold"}
    assert found["Merged"] == {**deme, "by": "uniform", "search": "grid"}
    assert found["By SNR"] == {**deme, "by": "log-snr"}


def test_the_protocol_tells_the_budget_the_seeds_and_the_card(stage: Stage) -> None:
    rows = all_done(jobs_of(PLAN, stage))
    told = gathered(rows).protocol
    assert "as many updates" in told[0]
    assert "training seeds 0, 7" in told[0]
    assert any("ddim 2 steps" in line for line in told[1:])
    told = gathered(rows, replace(PLAN, budget="compute")).protocol
    assert "as many training FLOPs" in told[0]


@pytest.mark.parametrize(
    "text", ["", '{"rows": [{"met', "{}", "[]", '{"rows": []}', '{"rows": [{}, {}]}']
)
def test_a_damaged_measure_is_named(stage: Stage, text: str) -> None:
    rows = all_done(jobs_of(PLAN, stage))
    path = rows[2].results[7].folder / "measure-0.json"
    path.write_text(text)
    with pytest.raises(ArtifactError) as caught:
        gathered(rows)
    assert str(caught.value).startswith(f"{path}: cannot be read")
    assert "remove its folder" in str(caught.value)


@pytest.mark.parametrize("text", [None, '{"step": 10, "images_per'])
def test_a_damaged_curve_is_named(stage: Stage, text: str | None) -> None:
    rows = all_done(jobs_of(PLAN, stage))
    curve = rows[1].trainings[0].curves[0]
    curve.unlink() if text is None else curve.write_text(text)
    with pytest.raises(ArtifactError, match=curve.name):
        gathered(rows)
