"""Commands started several times at once, as torchrun, accelerate launch and srun do.

What each process of a launch does: share the work, or leave it to the first.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import ends, launch, succeed

from deme_cli.app import COMMANDS, JOINT, PARTS
from deme_cli.artifacts import load_tensors, read_record
from deme_cli.distributed import only_first
from deme_cli.merging.journal import read_journal

SECOND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
EXPERTS = ["ft_1of4.safetensors", "ft_3of4.safetensors"]
GRID = ["--search", "grid", "--grid", "0,0.2,0.4,0.6,0.8,1", "--num", "64"]
SLOW_GRID = [*GRID[:4], "--num", "1000", "--no-report"]
MERGED, JOURNAL = Path("merged.safetensors"), Path("merged.trials.jsonl")

# Every command line that leaves its work to the first process; half of them would be refused.
LEAVING = [
    [command, *part]
    for command in COMMANDS
    if command not in JOINT
    for part in ([[part] for part in PARTS.get(command, ())] or [[]])
]
MERGES = [
    ["-w", "1,2"],
    ["-w", "1,2", "--search", "grid"],
    ["--method", "ties"],
    ["--show", "x.jsonl"],
    ["--replay", "x.safetensors"],
    ["--search", "grid", "--dry-run"],
]
LEAVE = """
import json, sys
from typer.testing import CliRunner
from deme_cli.app import app
leaving, merges = json.loads(sys.argv[1])
lines = [[*words, *more] for words in leaving for more in (["nowhere"], ["--no-such-option"], [])]
for words in [*lines, *(["merge", "a", "b", *words] for words in merges)]:
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.output) == (0, ""), (words, done.output, done.exception)
for words in [*leaving, ["merge"]]:
    assert "Example:" in CliRunner().invoke(app, [*words, "--help"]).stdout, words
print({"torch", "numpy", "diffusers", "optuna"} & set(sys.modules))
"""


def test_all_but_the_first_process_leave_at_once_what_is_no_joint_work(tmp_path: Path) -> None:
    assert len(LEAVING) == 15, "with the parts of `analyze`"
    done = subprocess.run(
        [sys.executable, "-c", LEAVE, json.dumps([LEAVING, MERGES])], capture_output=True,
        text=True, cwd=tmp_path, env={**os.environ, **SECOND},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"
    assert list(tmp_path.iterdir()) == []


def test_the_first_process_is_alone_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECOND, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    only_first()
    assert os.environ["WORLD_SIZE"] == "1"
    only_first()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        only_first()
    assert left.value.code == 0


# Processes of their own.


def wait_for_trials(processes: list[subprocess.Popen]) -> None:
    """Until every process, just launched, has begun a trial, and some are done."""
    before = workers_of(JOURNAL.read_text()) if JOURNAL.exists() else set()
    while True:
        text = JOURNAL.read_text() if JOURNAL.exists() else ""
        begun = workers_of(text) - before
        if len(begun) == len(processes) and text.count('"op_code":6') > 3:
            return
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.05)


def workers_of(journal: str) -> set[str]:
    return set(re.findall(r'"worker": *"([^"]+)"', journal))


def points_of(journal: Path) -> dict[tuple, float]:
    """The objective of each point that was tried, each tried once."""
    return {(trial.stage, *trial.point): trial.value for trial in read_journal(journal)[2]}


def require_same(found: Path, wanted: Path) -> None:
    one, other = read_record(found, "merged"), read_record(wanted, "merged")
    assert one.fingerprint == other.fingerprint
    assert one.coefficients == other.coefficients
    assert {**one.search, "seconds": 0} == {**other.search, "seconds": 0}
    assert one.report == other.report
    weights = load_tensors(wanted)
    for name, tensor in load_tensors(found).items():
        assert tensor.equal(weights[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [GRID, ["--search", "random", "--evaluations", "12", "--objective", "loss:4,kid@16",
                     "--steps", "2", "--num", "64", "--no-report"]]
)  # fmt: skip
def test_two_processes_find_what_one_does(
    deme: Callable, run_folder: Path, words: list[str]
) -> None:
    processes = launch(run_folder, "merge", *EXPERTS, *words, "--json")
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert json.loads(outputs[0][0])["path"] == str(MERGED)
    assert outputs[1] == ("", "")
    assert "2 processes work together" in outputs[0][1]
    assert len(workers_of(JOURNAL.read_text())) == 2, "one did all the work"
    told = [line for line in outputs[0][1].splitlines() if line.startswith("trial ")]
    assert len(told) == len(points_of(JOURNAL)), "each trial is a line"
    names = {path.name for path in run_folder.iterdir()}
    whole = Path("whole.safetensors")
    assert deme("merge", *EXPERTS, *words, "-o", whole).exit_code == 0
    require_same(MERGED, whole)
    assert points_of(JOURNAL) == points_of(Path("whole.trials.jsonl"))
    assert not [name for name in names if name.startswith(".")], "nothing hidden is left"


def test_jobs_are_a_launch_of_the_same_command_line(run_folder: Path) -> None:
    words = ["merge", *EXPERTS, *GRID[:4], "--num", "256", "--no-report", "--jobs", "2"]
    (alone,) = launch(run_folder, *words, num=1)
    said = alone.communicate(timeout=120)
    assert alone.returncode == 0, said
    assert said[0].split()[0] == str(MERGED)
    assert "2 processes work together" in said[1]
    assert len(workers_of(JOURNAL.read_text())) == 2
    code, why = ends(launch(run_folder, *words, "--force"))
    assert code == [2, 2]
    assert "this is one of 2 processes already" in why[0]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_a_search_and_one_process_ends_it(
    deme: Callable, run_folder: Path
) -> None:
    words = ["merge", *EXPERTS, *SLOW_GRID]
    processes = launch(run_folder, *words)
    wait_for_trials(processes)
    processes[1].send_signal(signal.SIGTERM)  # the other one is not asked
    codes, said = ends(processes)
    assert codes == [75, 75]
    assert len(said) == 1, said
    assert "trials are saved in merged.trials.jsonl; run the same command again" in said[0]
    assert not MERGED.exists()
    assert 0 < len(read_journal(JOURNAL)[2]) < 37
    done = deme(*words)
    assert done.exit_code == 0, done.exception
    assert "continuing after" in done.stderr
    assert len(points_of(JOURNAL)) == 37
    assert not list(run_folder.glob(".*"))


@pytest.mark.slow
def test_trials_of_processes_that_were_killed_come_back(run_folder: Path) -> None:
    processes = launch(run_folder, "merge", *EXPERTS, *SLOW_GRID, num=3)
    wait_for_trials(processes)
    processes[0].kill()  # without the first process the others end, and their trials are kept
    codes, said = ends(processes)
    assert codes == [-signal.SIGKILL, 1, 1]
    assert len(said) == 1, said
    assert "another process of this launch has ended; " in said[0]
    assert not MERGED.exists()
    processes = launch(run_folder, "merge", *EXPERTS, *SLOW_GRID)
    wait_for_trials(processes)
    processes[1].kill()
    codes, said = ends(processes)
    assert codes == [0, -signal.SIGKILL]
    assert said == []
    assert len(points_of(JOURNAL)) == 37
    assert read_record(MERGED).fingerprint == read_journal(JOURNAL)[3]
    assert not list(run_folder.glob(".*"))


@pytest.mark.slow
def test_what_is_wrong_is_told_once_and_a_plain_merge_made_once(run_folder: Path) -> None:
    before = sorted(run_folder.iterdir())
    for code, word, words, by_rank in (
        (3, "nowhere.safetensors", ["nowhere.safetensors", *GRID], lambda rank: []),
        (2, "put WORLD_SIZE=1 before", [*EXPERTS, *GRID], lambda rank: ["--seed", f"{rank}"]),
    ):
        codes, said = ends(launch(run_folder, "merge", *words, by_rank=by_rank))
        assert codes == [code, code], said
        assert len(said) == 1, said
        assert word in said[0]
    assert sorted(run_folder.iterdir()) == before
    assert succeed(launch(run_folder, "merge", *EXPERTS, "-w", "0.5,0.5")).split() == [str(MERGED)]
