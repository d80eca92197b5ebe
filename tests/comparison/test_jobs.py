"""Jobs: what rows share, what a changed setting makes anew, and what the commands are told."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from deme_cli.comparison.jobs import (
    DONE_NAME,
    SETTINGS_NAME,
    Job,
    RowJobs,
    Stage,
    jobs_of,
    slug,
)
from deme_cli.comparison.plan import MeasurePlan, Plan, RowPlan
from deme_cli.config import CONFIG_NAME, EvalConfig, FinetuneConfig, MergeConfig, SampleConfig
from deme_cli.errors import ConfigError
from deme_cli.run_file import RunFile, read_run_file
from deme_cli.timesteps import split_uniform

TABLES = {
    "data": {"source": "digits"},
    "finetune": {"batch_size": 4, "lr": 1e-3},
    "sample": {"steps": 2},
    "eval": {"fid": "digits", "num": 6},
}
MEASURE = MeasurePlan("", TABLES["sample"], TABLES["eval"])
BEFORE = RowPlan("Before", "base", 1)
PLAIN = RowPlan("Plain", "finetune", 1)
EXPERTS = RowPlan("DeMe (ensemble)", "ensemble", 4)
MERGED = RowPlan("DeMe (merged)", "merged", 4)
PLAN = Plan("Four rows", 4, (BEFORE, PLAIN, EXPERTS, MERGED), seeds=(0, 7))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return stage_of(tmp_path, PLAN)


def stage_of(folder: Path, plan: Plan, updates: int = 80, **settings: Any) -> Stage:
    wanted = {(row.by, row.n) for row in plan.rows}
    return Stage(**{
        "folder": folder / "out",
        "base": folder / "base" / "base.safetensors",
        "fingerprint": "f" * 64,
        "tables": TABLES,
        "ranges": {(by, n): [str(span) for span in split_uniform(n, 100)] for by, n in wanted},
        "updates": {row.name: updates for row in plan.rows},
        "measures": (MEASURE,),
        **settings,
    })  # fmt: skip


def by_name(plan: Plan, stage: Stage) -> dict[str, RowJobs]:
    return {jobs.row.name: jobs for jobs in jobs_of(plan, stage)}


def trainings(jobs: RowJobs) -> set[Path]:
    return {job.folder for job in jobs.trainings.values()}


def results(jobs: RowJobs) -> set[Path]:
    return {job.folder for job in jobs.results.values()}


def written(job: Job, name: str = CONFIG_NAME) -> RunFile:
    """The settings file of a job as the command that runs there reads it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / name).write_text(job.files[name])
    return read_run_file(job.folder / name)


def with_row(name: str, **changes: Any) -> Plan:
    """The plan with one row changed."""
    rows = [replace(one, **changes) if one.name == name else one for one in PLAN.rows]
    return replace(PLAN, rows=tuple(rows))


def test_rows_of_the_same_settings_share_one_training(stage: Stage) -> None:
    rows = by_name(PLAN, stage)
    assert trainings(rows["DeMe (ensemble)"]) == trainings(rows["DeMe (merged)"])
    assert not trainings(rows["DeMe (ensemble)"]) & trainings(rows["Plain"])
    folders = [one.folder for jobs in rows.values() for one in jobs.results.values()]
    assert len(set(folders)) == len(folders) == 1 + 3 * len(PLAN.seeds)


def test_settings_written_out_are_the_same_as_settings_left_out(stage: Stage) -> None:
    plain, defaults = by_name(PLAN, stage), asdict(FinetuneConfig())
    told = {name: defaults[name] for name in ("p", "consistency", "projection", "beta1")}
    spelled = by_name(with_row("DeMe (merged)", finetune=told), stage)
    assert trainings(spelled["DeMe (merged)"]) == trainings(plain["DeMe (merged)"])


def test_the_base_trains_nothing_and_is_measured_once(stage: Stage) -> None:
    jobs = by_name(PLAN, stage)["Before"]
    assert (jobs.trainings, jobs.finetune) == ({}, None)
    assert list(jobs.results) == [None]
    (command,) = jobs.results[None].commands
    assert command.words[:2] == ("eval", os.path.relpath(stage.base, jobs.results[None].folder))


def test_one_network_on_all_timesteps_is_plain_unless_its_row_says_otherwise(
    stage: Stage,
) -> None:
    tables = {**TABLES, "finetune": {"p": 0.5, "consistency": 2.0, "projection": "block"}}
    stage = replace(stage, tables=tables)
    plan = with_row("Plain", finetune={"projection": "fold"})
    for rows, expected in (
        (by_name(PLAN, stage), (0.0, 0.0, "none")),
        (by_name(plan, stage), (0.0, 0.0, "fold")),
    ):
        config = rows["Plain"].finetune
        assert (config.p, config.consistency, config.projection) == expected
    config = by_name(PLAN, stage)["DeMe (merged)"].finetune
    assert (config.p, config.consistency, config.projection) == (0.5, 2.0, "block")


def test_every_row_that_trains_has_the_same_updates_shared_by_its_ranges(tmp_path: Path) -> None:
    rows = tuple(RowPlan(f"{n} ranges", "ensemble", n) for n in (1, 2, 4, 8, 16))
    plan = replace(PLAN, rows=(*rows, PLAIN))
    for jobs in jobs_of(plan, stage_of(tmp_path, plan)):
        assert jobs.finetune.steps == 80 // jobs.row.n
        assert {job.updates for job in jobs.trainings.values()} == {80}
        for job in jobs.trainings.values():
            assert len(job.curves) == jobs.row.n


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DeMe (merged)", {"finetune": {"p": 0.1}}),
        ("DeMe (ensemble)", {"finetune": {"consistency": 0.0}}),
        ("Plain", {"finetune": {"loss_weighting": "p2"}}),
        ("DeMe (merged)", {"n": 2}),
        ("DeMe (merged)", {"by": "log-snr"}),
    ],
)
def test_a_changed_training_is_another_training_and_another_result_of_that_row_alone(
    tmp_path: Path, name: str, changes: Mapping[str, Any]
) -> None:
    plan = with_row(name, **changes)
    stage = stage_of(tmp_path, plan)
    stage = replace(stage, ranges={**stage_of(tmp_path, PLAN).ranges, **stage.ranges})
    if changes.get("by"):
        stage = replace(stage, ranges={**stage.ranges, ("log-snr", 4): ["0:10", "10:100"]})
    before, after = by_name(PLAN, stage), by_name(plan, stage)
    assert not trainings(before[name]) & trainings(after[name])
    assert not results(before[name]) & results(after[name])
    for other in set(before) - {name}:
        assert trainings(before[other]) == trainings(after[other])
        assert results(before[other]) == results(after[other])


def test_a_changed_merge_is_another_result_of_the_same_training(stage: Stage) -> None:
    name, before = "DeMe (merged)", by_name(PLAN, stage)
    after = by_name(with_row(name, merge={"search": "grid"}), stage)
    assert trainings(before[name]) == trainings(after[name])
    assert not results(before[name]) & results(after[name])
    for other in set(before) - {name}:
        assert results(before[other]) == results(after[other])


def folders(plan: Plan, stage: Stage) -> tuple[set[Path], set[Path]]:
    """Of all rows that train: their training and their result folders."""
    rows = [jobs for jobs in jobs_of(plan, stage) if jobs.trainings]
    return set().union(*map(trainings, rows)), set().union(*map(results, rows))


@pytest.mark.parametrize(
    ("changes", "trains_anew", "measures_anew"),
    [
        ({"device": "cuda:1"}, False, False),
        ({"dtype": "bf16"}, True, True),
        ({"fingerprint": "e" * 64}, True, True),
        ({"affinity": "e" * 64}, False, False),  # no row is clustered by gradients
        ({"tables": {**TABLES, "data": {"source": "cifar10"}}}, True, True),
        ({"tables": {**TABLES, "finetune": {"batch_size": 4, "lr": 2e-3}}}, True, True),
        ({"measures": (replace(MEASURE, sample={"steps": 3}),)}, False, True),
        ({"measures": (replace(MEASURE, eval={"fid": "digits", "num": 7}),)}, False, True),
        ({"measures": (replace(MEASURE, sample={"steps": 2, "batch_size": 9}),)}, False, False),
        ({"tables": {**TABLES, "finetune": {**TABLES["finetune"], "clusters": 3}}}, False, False),
        ({"tables": {**TABLES, "finetune": {**TABLES["finetune"], "held_out": 9}}}, False, False),
        ({"tables": {**TABLES, "finetune": {**TABLES["finetune"], "cache": "off"}}}, False, False),
    ],
)
def test_what_decides_a_result_decides_where_it_lies(
    stage: Stage, changes: dict[str, Any], trains_anew: bool, measures_anew: bool
) -> None:
    before, after = folders(PLAN, stage), folders(PLAN, replace(stage, **changes))
    for one, other, is_anew in zip(before, after, (trains_anew, measures_anew), strict=True):
        assert one.isdisjoint(other) if is_anew else one == other


def test_other_measures_are_other_results_of_the_same_trainings(stage: Stage) -> None:
    short = replace(stage, measures=(MeasurePlan("short", {"steps": 3}),))
    before, after = folders(PLAN, stage), folders(PLAN, short)
    assert before[0] == after[0]
    assert before[1].isdisjoint(after[1])


def test_gradients_decide_the_rows_that_are_clustered_by_them(stage: Stage) -> None:
    settings = {"multitask": "uw", "clusters": 2, "cluster_by": "gradient"}
    plan = with_row("Plain", finetune=settings)
    one, other = (by_name(plan, replace(stage, affinity=digest)) for digest in ("a", "b"))
    assert not trainings(one["Plain"]) & trainings(other["Plain"])
    assert trainings(one["DeMe (merged)"]) == trainings(other["DeMe (merged)"])


def test_a_further_seed_is_a_further_folder_and_moves_nothing(stage: Stage) -> None:
    before, after = folders(PLAN, stage), folders(replace(PLAN, seeds=(7, 0, 3)), stage)
    for one, other in zip(before, after, strict=True):
        assert one < other
        assert {folder.name for folder in other - one} == {"seed-3"}


def test_a_training_reads_exactly_the_settings_of_its_row(stage: Stage) -> None:
    rows = by_name(with_row("DeMe (merged)", finetune={"p": 0.25}), stage)
    for name, jobs in rows.items():
        for seed, job in jobs.trainings.items():
            run = written(job)
            assert run.settings(FinetuneConfig) == replace(jobs.finetune, seed=seed), name
            assert [str(one) for one in run.tables["split"]["ranges"]] == list(
                stage.ranges["uniform", jobs.row.n]
            )
            assert run.base.resolve() == stage.base.resolve()
            assert run.tables["data"] == TABLES["data"]


def test_averages_and_snapshots_of_the_common_settings_are_left_out(stage: Stage) -> None:
    common = {**TABLES["finetune"], "snapshot_every": 200, "ema_lengths": [0.1]}
    stage = replace(stage, tables={**TABLES, "finetune": common})
    for jobs in jobs_of(PLAN, stage):
        for seed, job in jobs.trainings.items():
            found = written(job).settings(FinetuneConfig)
            assert found == replace(jobs.finetune, seed=seed)
            assert (found.snapshot_every, found.ema_lengths) == (None, None)


def test_a_merge_searches_from_another_seed_for_every_training_seed(stage: Stage) -> None:
    common = replace(stage, tables={**TABLES, "merge": {"num": 5, "seed": 100}})
    plan = with_row("DeMe (merged)", merge={"search": "cmaes"})
    jobs = by_name(plan, common)["DeMe (merged)"]
    found = {seed: written(job).settings(MergeConfig) for seed, job in jobs.results.items()}
    assert {seed: config.seed for seed, config in found.items()} == {0: 100, 7: 107}
    assert found[0] == MergeConfig(num=5, seed=100, search="cmaes")
    default = by_name(plan, stage)["DeMe (merged)"].results[7]
    assert written(default).settings(MergeConfig).seed == MergeConfig().seed + 7


def test_a_merged_row_is_merged_without_a_report_then_measured(stage: Stage) -> None:
    jobs = by_name(PLAN, stage)["DeMe (merged)"]
    job, training = jobs.results[7], jobs.trainings[7]
    merge, measure = job.commands
    experts = [os.path.relpath(training.folder / f"ft_{i}of4.safetensors", job.folder)
               for i in range(1, 5)]  # fmt: skip
    assert merge.words[:6] == ("merge", *experts, "--no-report")
    assert merge.output == "merged.safetensors"
    assert measure.words[:2] == ("eval", "merged.safetensors")
    assert measure.output in measure.words
    assert job.needs == (training.folder,)


def test_an_ensemble_is_all_its_experts_in_one_eval(stage: Stage) -> None:
    jobs = by_name(PLAN, stage)["DeMe (ensemble)"]
    (command,) = jobs.results[0].commands
    told = [(jobs.results[0].folder / word).resolve() for word in command.words[1:5]]
    assert told == [
        (jobs.trainings[0].folder / f"ft_{i}of4.safetensors").resolve() for i in range(1, 5)
    ]
    (train,) = jobs.trainings[0].commands
    assert train.words[:3] == ("finetune", "--range", "all")
    assert train.output == "ft_4of4.safetensors", "the last that it writes"


def test_every_row_is_measured_under_every_measure_alike(stage: Stage) -> None:
    stage = replace(
        stage,
        measures=(
            MeasurePlan("fast", {"steps": 3}, TABLES["eval"]),
            MeasurePlan("many", {"steps": 2}, {"fid": "digits", "num": 9, "repeats": 2}),
        ),
    )
    expected = [
        (SampleConfig(steps=3), EvalConfig(fid="digits", num=6)),
        (SampleConfig(steps=2), EvalConfig(fid="digits", num=9, repeats=2)),
    ]
    for jobs in jobs_of(PLAN, stage):
        for job in jobs.results.values():
            commands = [one for one in job.commands if one.words[0] == "eval"]
            names = [one.words[one.words.index("--config") + 1] for one in commands]
            runs = [written(job, name) for name in names]
            found = [(run.settings(SampleConfig), run.settings(EvalConfig)) for run in runs]
            assert found == expected, "the same protocol, whatever the row"
            assert len({one.output for one in commands}) == 2


def test_every_command_is_told_the_device_and_the_precision(stage: Stage) -> None:
    stage = replace(stage, device="cuda:1", dtype="bf16")
    for jobs in jobs_of(PLAN, stage):
        for job in (*jobs.trainings.values(), *jobs.results.values()):
            for command in job.commands:
                told = dict(zip(command.words, command.words[1:], strict=False))
                assert (told["--device"], told["--dtype"]) == ("cuda:1", "bf16")


def test_what_decided_a_job_lies_beside_it_as_json(stage: Stage) -> None:
    jobs = by_name(PLAN, stage)["DeMe (merged)"]
    training = json.loads(jobs.trainings[0].files[SETTINGS_NAME])
    assert training["lr"] == 1e-3
    assert training["base"] == stage.fingerprint
    result = json.loads(jobs.results[0].files[SETTINGS_NAME])
    assert result["training"] == jobs.trainings[0].folder.parent.name
    (measure,) = result["measures"]
    assert (measure["eval"]["num"], measure["sample"]["steps"]) == (6, 2)
    assert "batch_size" not in measure["sample"], "it does not change the images"


def test_a_job_is_done_once_it_says_so(stage: Stage) -> None:
    job = by_name(PLAN, stage)["Plain"].trainings[0]
    job.folder.mkdir(parents=True)
    assert not job.is_done
    (job.folder / DONE_NAME).write_text("{}")
    assert job.is_done


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_weighting": "snr2"}, "loss_weighting = 'snr2': expected one of none, uniform"),
        ({"multitask": "ant"}, "multitask = 'ant': expected one of none, uw"),
        ({"multitask": "uw", "clusters": 5}, "clusters = 5: expected from 2 to batch_size = 4"),
        ({"weighting_gamma": 5.0}, "weighting_gamma belongs to min-snr"),
        ({"p": 1.5}, "p = 1.5: expected a probability"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_the_name_of_the_row(
    stage: Stage, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        jobs_of(with_row("Plain", finetune=settings), stage)
    assert str(caught.value).startswith("row 'Plain': ")
    assert words in str(caught.value)


def test_a_name_becomes_a_short_file_name() -> None:
    assert slug("DeMe (after merge)") == "deme-after-merge"
    assert slug("../../etc") == "etc"
    assert slug("日本") == "row"
    assert len(slug("x" * 400)) == 40
