"""`deme compare` from the command line: one comparison that has run, and what becomes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

import deme_cli
from deme_cli.app import app
from deme_cli.artifacts import read_record
from deme_cli.errors import ArtifactError, DemeError

Deme = Callable[..., Result]
COMMON = """
title = "A tiny comparison"
n = 2
updates = 4
seeds = [0]
[finetune]
batch_size = 4
held_out = 0
[sample]
steps = 2
[eval]
fid = "digits"
num = 6
repeats = 2
[[row]]
name = "Before"
kind = "base"
"""
MERGED = """
[[row]]
name = "Merged"
kind = "merged"
finetune = { p = 0.2 }
merge = { coefficients = [0.5, 0.5] }
"""
BROKEN = """
[[row]]
name = "Broken"
kind = "finetune"
finetune = { lr = 1e30 }
"""
PLAN = COMMON + MERGED
FORMS = ("md", "json", "png", "svg")
FID = "frechet_digits"


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with `tiny.toml` and its finished comparison, made once, whichever process asks.

    `said.json` holds the exit code and what the command wrote.
    """
    root = tmp_path_factory.getbasetemp()
    root = (root if worker_id == "master" else root.parent) / "compare"
    with FileLock(f"{root}.lock"):
        if not (root / "said.json").exists():
            root.mkdir(exist_ok=True)
            (root / "tiny.toml").write_text(PLAN)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(root)
                words = ["compare", "tiny.toml", "--jobs", "2", "--device", "cpu"]
                done = CliRunner().invoke(app, words)
            said = {"code": done.exit_code, "out": done.stdout, "err": done.stderr}
            (root / "said.json").write_text(json.dumps(said))
    return root


@pytest.fixture
def folder(first_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a copy of the finished comparison and its plan in it."""
    shutil.copytree(first_run / "tiny", tmp_path / "tiny")
    shutil.copy(first_run / "tiny.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a plan in it and nothing else."""
    (tmp_path / "tiny.toml").write_text(PLAN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(deme: Deme, *options: object) -> Result:
    return deme("compare", "tiny.toml", "--device", "cpu", *options)


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["rows"]}


def document(folder: Path) -> dict[str, dict[str, Any]]:
    return rows_of(json.loads((folder / "tiny" / "compare.json").read_text()))


def traces(folder: Path) -> dict[str, int]:
    """Every file of the jobs and of the base, by name, with the time it was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for name in ("rows", "trainings", "base")
        for path in (folder / "tiny" / name).rglob("*")
        if path.is_file()
    }


def test_a_comparison_ends_in_a_table_of_every_form_and_a_picture(first_run: Path) -> None:
    said = json.loads((first_run / "said.json").read_text())
    assert said["code"] == 0, said["err"]
    assert said["out"].split() == [f"tiny/compare.{form}" for form in FORMS]
    for words in ("Before", "Merged", FID, "minus first", "ddim 2 steps", "training seeds 0"):
        assert words in said["err"]
    left = {path.name for path in (first_run / "tiny").rglob("*")}
    assert not {name for name in left if name.endswith((".lock", ".partial"))}


def test_the_figures_are_those_that_were_measured(first_run: Path) -> None:
    found = document(first_run)
    for name, seed in (("Before", None), ("Merged", 0)):
        (path,) = (first_run / "tiny" / "rows").glob(f"{name.lower()}-*/*/measure-0.json")
        (measured,) = json.loads(path.read_text())["rows"]
        (result,) = found[name]["results"]
        values = measured["metrics"][FID]["values"]
        assert (len(values), result["seed"], result["values"]) == (2, seed, {FID: values})
    merged = found["Merged"]
    assert (merged["updates"], merged["images"], merged["num_ranges"]) == (4, 16, 2)
    assert merged["flops"] > 0
    assert merged["results"][0]["seconds"] > 0
    assert merged["results"][0]["coefficients"] == [0.5, 0.5]
    assert merged["settings"] == {
        "p": 0.2, "consistency": 0.0, "projection": "fold", "by": "uniform", "search": "none",
        "coefficients": [0.5, 0.5],
    }  # fmt: skip
    difference = merged["metrics"][FID]["difference"]["mean"]
    means = [found[name]["metrics"][FID]["mean"] for name in ("Merged", "Before")]
    assert difference == pytest.approx(means[0] - means[1])
    (training,) = (first_run / "tiny" / "trainings").glob("2x2-*/seed-0")
    experts = [read_record(training / f"ft_{i}of2.safetensors", "expert") for i in (1, 2)]
    assert [(one.steps, one.p, one.range) for one in experts] == [
        (2, 0.2, [0, 500]), (2, 0.2, [500, 1000]),
    ]  # fmt: skip
    record = read_record(next(first_run.rglob("merged.safetensors")), "merged")
    assert (record.coefficients, record.report) == ([0.5, 0.5], None)
    assert [one["fingerprint"] for one in record.parents] == [one.fingerprint for one in experts]


def test_run_again_it_runs_nothing_and_tells_the_same(folder: Path, deme: Deme) -> None:
    for expert in folder.rglob("ft_*.safetensors"):
        expert.unlink()  # their row is measured: nobody needs them
    before, told = traces(folder), (folder / "tiny" / "compare.json").read_bytes()
    done = compare(deme, "--json", "--quiet")
    assert done.exit_code == 0, done.exception
    assert traces(folder) == before
    assert (folder / "tiny" / "compare.json").read_bytes() == told
    shown = json.loads(done.stdout)  # one document
    assert shown.pop("paths") == [f"tiny/compare.{form}" for form in FORMS]
    assert shown == json.loads(told)
    assert done.stderr == ""
    found = deme_cli.compare("tiny.toml", device="cpu")
    assert {name: shown[name] for name in found.document} == json.loads(json.dumps(found.document))
    assert found.failures == []


def test_the_table_of_what_is_finished_runs_nothing(folder: Path, deme: Deme) -> None:
    before = traces(folder)
    done = compare(deme, "--table", "--seeds", "0,5")
    assert done.exit_code == 0, done.exception
    assert traces(folder) == before
    found = document(folder)
    assert [row["pending"] for row in found.values()] == [0, 1]
    assert "still to come, with the same command: Merged" in done.stderr
    assert [one["seed"] for one in found["Merged"]["results"]] == [0]


@pytest.mark.slow  # commands in processes of their own
def test_a_changed_row_is_made_anew_and_a_broken_one_fails_alone(folder: Path, deme: Deme) -> None:
    """Coefficients of 0 leave the base bit for bit, and all rows share their starting noise."""
    changed = PLAN.replace("[0.5, 0.5]", "[0.0, 0.0]")
    (folder / "tiny.toml").write_text(changed + BROKEN)
    before = traces(folder)
    done = compare(deme, "--jobs", "2", "--json")
    assert isinstance(done.exception, DemeError)
    assert done.exception.exit_code == 5, "that of the command that failed"
    assert "rows that have failed: Broken: the loss became nan" in str(done.exception)
    now = traces(folder)
    assert {name: now[name] for name in before} == before, "what was finished stays"
    assert not [n for n in set(now) - set(before) if n.startswith("tiny/trainings/2x2")]
    found = rows_of(json.loads(done.stdout))
    assert found == document(folder)
    assert found["Merged"]["results"][0]["values"] == found["Before"]["results"][0]["values"]
    (reason,) = found["Broken"]["failures"]
    assert found["Broken"]["results"] == []
    (log,) = (folder / "tiny" / "trainings").glob("1x4-*/seed-0/log.txt")
    assert reason in log.read_text()


def test_one_job_can_be_done_alone_from_its_folder(folder: Path, deme: Deme) -> None:
    (job,) = (folder / "tiny" / "rows").glob("merged-*/seed-0")
    whole = json.loads((job / "measure-0.json").read_text())
    for name in ("merged.safetensors", "measure-0.json"):
        (job / name).unlink()
    done = deme("compare", job)
    assert (done.exit_code, done.stdout) == (0, "")
    assert json.loads((job / "measure-0.json").read_text()) == whole


def test_a_dry_run_says_what_would_run_and_leaves_nothing_behind(empty: Path, deme: Deme) -> None:
    done = compare(deme, "--dry-run", "--json")
    assert done.exit_code == 0, done.exception
    assert [path.name for path in empty.iterdir()] == ["tiny.toml"]
    found, said = json.loads(done.stdout), done.stderr
    assert (found["dry_run"], found["jobs"]) == (True, 3)
    for words in (
        "  Before: to do", "  2 x 2 updates, seed 0 (Merged): to do", "  Merged, seed 0: to do",
        "TFLOP of training per seed",
    ):  # fmt: skip
        assert words in said
    said = compare(deme, "--dry-run", "--only", "Mer*").stderr
    assert "Merged, seed 0" in said
    assert "Before" not in said


def test_options_win_over_the_plan(folder: Path, deme: Deme) -> None:
    before = traces(folder)
    said = compare(deme, "--dry-run", "--updates", 12, "--seeds", "3,4").stderr
    for seed in (3, 4):
        assert f"2 x 6 updates, seed {seed} (Merged): to do" in said
    assert "  Before: done" in said, "the base has no seed and no updates"
    said = compare(deme, "--dry-run", "--budget", "compute", "--updates", 1000).stderr
    assert "(Merged): to do" in said
    assert "2 x 500 updates" not in said, "its projection costs, so it has fewer"
    assert traces(folder) == before


def test_the_base_and_settings_of_the_deme_toml_here_are_used_or_a_model_imported_once(
    run_folder: Path, deme: Deme
) -> None:
    (run_folder / "tiny.toml").write_text(PLAN.replace("updates = 4\n", ""))
    (run_folder / "deme.toml").write_text('[data]\nsource = "digits"\n[finetune]\nsteps = 7\n')
    done = compare(deme, "--dry-run")
    assert done.exit_code == 0, done.exception
    assert "2 x 7 updates, seed 0 (Merged)" in done.stderr
    assert not (run_folder / "tiny").exists()
    (run_folder / "deme.toml").unlink()
    for _ in range(2):
        done = compare(deme, "--model", "base.safetensors", "--data", "digits", "--table")
        assert done.exit_code == 0, done.exception
    assert "imported" not in done.stderr
    assert document(run_folder)["Before"]["pending"] == 1
    assert not (run_folder / "tiny" / "compare.png").exists(), "there is nothing to draw yet"
    (base,) = (run_folder / "tiny" / "base").rglob("base.safetensors")
    whole = read_record(run_folder / "base.safetensors").fingerprint
    assert read_record(base).fingerprint == whole


def test_what_does_not_belong_into_one_table_is_named(folder: Path, deme: Deme) -> None:
    (path,) = (folder / "tiny" / "rows").glob("merged-*/seed-0/measure-0.json")
    measured = json.loads(path.read_text())
    measured["rows"][0]["protocol"]["references"][FID]["n"] = 200
    for text in (json.dumps(measured), "{", '{"rows": []}'):
        path.write_text(text)
        done = compare(deme, "--table")
        assert isinstance(done.exception, ArtifactError)
        assert str(path) in str(done.exception)
        assert "remove its folder" in str(done.exception)


def test_a_failure_is_remembered_by_later_tables(folder: Path, deme: Deme) -> None:
    (job,) = (folder / "tiny" / "rows").glob("merged-*/seed-0")
    (job / "measure-0.json").rename(job / "kept")
    (job / "failed.json").write_text('{"message": "no disk", "exit_code": 3}')
    done = compare(deme, "--table", "--json")
    assert rows_of(json.loads(done.stdout))["Merged"]["failures"] == ["no disk"]
    assert done.exception.exit_code == 3
    done = compare(deme, "--table", "--only", "Before")
    assert done.exit_code == 0, "another row was asked for"
    (job / "kept").rename(job / "measure-0.json")
    assert compare(deme).exit_code == 0


REFUSED = [
    (["--seeds", "1,x"], 2, "--seeds '1,x': expected whole numbers"),
    (["--seeds", "1,1"], 2, "seeds = [1, 1]"),
    (["--updates", 0], 2, "--updates 0"),
    (["--jobs", 0], 2, "--jobs 0"),
    (["--only", "Nothing"], 2, "no row of that name; there are 'Before', 'Merged'"),
    (["--model", "nowhere"], 3, "nowhere"),
    (["--data", "nowhere"], 3, "nowhere"),
    (["--config", "nowhere.toml"], 3, "nowhere.toml"),
]


def test_wrong_input_is_one_clear_line(empty: Path, refuse: Callable) -> None:
    """A reference that is not there is missed before anything trains."""
    (empty / "far.toml").write_text(PLAN.replace('fid = "digits"', 'fid = "no/such/folder"'))
    refuse(3, "[eval]: ", "compare", "far.toml", "--dry-run")
    for options, exit_code, word in REFUSED:
        refuse(exit_code, word, "compare", "tiny.toml", "--dry-run", *options)
