"""A row that was finished with other settings: what is said of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deme_cli.comparison.jobs import DONE_NAME, SETTINGS_NAME, RowJobs, Stage, jobs_of
from deme_cli.comparison.plan import MeasurePlan, Plan, RowPlan
from deme_cli.comparison.work import change_of

PLAN = Plan(
    "Two rows", 2, (RowPlan("Before", "base", 1), RowPlan("Merged", "merged", 2)), seeds=(0, 1)
)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(
        folder=tmp_path,
        base=tmp_path / "base.safetensors",
        fingerprint="f" * 64,
        tables={"eval": {"fid": "digits", "num": 6}},
        ranges={("uniform", 1): ["0:100"], ("uniform", 2): ["0:50", "50:100"]},
        updates={row.name: 40 for row in PLAN.rows},
    )


def merged(stage: Stage, **changes: Any) -> RowJobs:
    """The row `Merged`, with changes of it."""
    return jobs_of(replace(PLAN, rows=(PLAN.rows[0], replace(PLAN.rows[1], **changes))), stage)[1]


def finish(jobs: RowJobs, *, seeds: tuple[int | None, ...] = (0, 1)) -> None:
    """Leave behind what a finished row does."""
    for job in (*jobs.trainings.values(), *(jobs.results[seed] for seed in seeds)):
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / SETTINGS_NAME).write_text(job.files[SETTINGS_NAME])
        (job.folder / DONE_NAME).write_text("{}")


def place(jobs: RowJobs) -> Path:
    return jobs.results[0].folder.parent


def test_nothing_is_said_of_a_row_that_is_new_unchanged_or_unfinished(stage: Stage) -> None:
    assert change_of(merged(stage)) is None
    finish(jobs_of(PLAN, stage)[0], seeds=(None,))
    assert change_of(merged(stage)) is None
    merged(stage).results[0].folder.mkdir(parents=True)
    assert change_of(merged(stage, finetune={"p": 0.1})) is None
    finish(merged(stage), seeds=(0,))
    assert change_of(merged(stage)) is None
    finish(merged(stage))
    assert change_of(merged(replace(stage, device="cuda"))) is None
    finish(merged(stage, finetune={"p": 0.1}))
    assert change_of(merged(stage)) is None  # back to what is finished
    for seeds in ({}, {"finetune": {"p": 0.1}}):
        for job in merged(stage, **seeds).results.values():
            (job.folder / SETTINGS_NAME).write_text("{")
    assert change_of(merged(stage, finetune={"p": 0.9})) is None


def test_changed_settings_are_named_with_both_values(stage: Stage) -> None:
    finish(merged(stage, merge={"search": "grid"}))
    said = change_of(merged(stage, merge={"search": "cmaes", "evaluations": 9}))
    assert "(merge.evaluations None -> 9, merge.search grid -> cmaes)" in said
    assert str(place(merged(stage, merge={"search": "grid"}))) in said
    grid = {"search": "grid"}
    changed = {"p": 0.1, "lr": 1e-3, "warmup": 3, "beta1": 0.9, "beta2": 0.9}
    said = change_of(merged(stage, finetune=changed, merge=grid))
    assert "(beta1 0.95 -> 0.9, beta2 0.999 -> 0.9, lr 5e-05 -> 0.001 and 2 more)" in said
    measure = MeasurePlan("", {}, {"fid": "digits", "num": 7})
    said = change_of(merged(replace(stage, measures=(measure,)), merge=grid))
    assert "eval.num 50000 -> 7" in said
    said = change_of(merged(replace(stage, fingerprint="e" * 64), merge=grid))
    assert f"(base {'f' * 64} -> {'e' * 64})" in said


def test_it_is_the_latest_result_that_a_row_is_held_against(stage: Stage) -> None:
    for age, p in enumerate((0.1, 0.2, 0.6, 0.5)):
        jobs = merged(stage, finetune={"p": p})
        finish(jobs)
        for path in place(jobs).rglob("*"):
            os.utime(path, (age % 3 + 1, age % 3 + 1))
    assert "(p 0.6 -> 0.9)" in change_of(merged(stage, finetune={"p": 0.9}))
