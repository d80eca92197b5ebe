"""What does the jobs: real processes, which find a small stand-in for deme in their own folder.

`python -m deme_cli` looks for its package in the current folder first. So a job brings PROGRAM with
it, which does what its job.json says and costs a twentieth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deme_cli.comparison.jobs import JOB_NAME, Failure, Job, do_job, work_off
from deme_cli.console import Step
from deme_cli.errors import Stopped
from deme_cli.jobs import claim

PROGRAM = """
import json, os, pathlib, signal, sys, time

def until(*paths, asked=()):
    end = time.monotonic() + 20
    while not all(map(os.path.exists, paths)) and not asked:
        time.sleep(0.01)
        if time.monotonic() > end:
            sys.exit("waited too long")

for verb, *words in json.loads(pathlib.Path("job.json").read_text())["do"]:
    with open("calls.txt", "a") as calls:
        print(verb, *words, file=calls)
    if verb == "write":
        pathlib.Path(words[0]).write_text(os.environ["OMP_NUM_THREADS"])
    elif verb == "fail":
        print("some words first", file=sys.stderr)
        print("deme: " + words[1], file=sys.stderr)
        sys.exit(int(words[0]))
    elif verb == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "meet":  # start, wait for another to have started
        pathlib.Path("started").touch()
        until(words[0])
    elif verb == "wait":  # as a training does: a signal asks, some time later all is saved
        asked = []
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda number, frame: asked.append(number))
        pathlib.Path("started").touch()
        until("go", asked=asked)
        if asked:
            time.sleep(0.3)
            pathlib.Path("saved").touch()
            sys.exit(75)
"""


def job(folder: Path, *verbs: tuple[str, ...], needs: Job | None = None, updates: int = 0) -> Job:
    """A job of the stand-in that is done when it has written `x`."""
    (folder / "deme_cli").mkdir(parents=True, exist_ok=True)
    (folder / "deme_cli" / "__init__.py").touch()
    (folder / "deme_cli" / "__main__.py").write_text(PROGRAM)
    return Job(folder, folder.name, {"do": verbs}, ["x"], needs, updates)


def calls(one: Job) -> list[str]:
    path = one.folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def work(*jobs: Job, at_once: int = 1) -> list[Step]:
    told: list[Step] = []
    work_off(jobs, at_once, told.append)
    return told


def test_needs_come_first_and_the_cores_are_shared_out(tmp_path: Path) -> None:
    training = job(tmp_path / "training", ("write", "x"))
    result = job(tmp_path / "result", ("meet", "../training/x"), ("write", "x"), needs=training)
    told = work(result, training, training, at_once=2)
    notes = [step.note.partition(",")[0] for step in told if step.note]
    assert notes == ["training: done", "result: done"]
    assert calls(training) == ["write x"]
    assert (training.folder / "x").read_text() == str(max(1, (os.cpu_count() or 1) // 2))
    assert (told[-1].done, told[-1].total) == (2, 2)


def test_a_failed_job_takes_those_that_need_it_along_and_no_other(tmp_path: Path) -> None:
    bad = job(tmp_path / "bad", ("fail", "5", "the loss is nan"), ("write", "x"))
    needy = job(tmp_path / "needy", ("write", "x"), needs=bad)
    killed = job(tmp_path / "killed", ("die",))
    good = job(tmp_path / "good", ("write", "x"))
    after = job(tmp_path / "after", ("write", "x"), needs=good)
    told = work(bad, needy, killed, good, after)
    assert bad.failure == needy.failure == Failure("the loss is nan", 5)
    assert any(step.note.startswith("bad: FAILED: the loss is nan") for step in told)
    assert killed.failure.exit_code == 1
    assert "SIGKILL" in killed.failure.message
    assert (calls(needy), good.is_done, after.is_done) == ([], True, True)
    assert (bad.folder / "log.txt").read_text() == "some words first\ndeme: the loss is nan\n"
    mended = job(bad.folder, ("write", "x"))
    work(mended, needy)
    assert (mended.failure, needy.is_done, calls(good)) == (None, True, ["write x"])


def test_what_is_done_is_not_run_again_and_what_is_left_is_no_failure(tmp_path: Path) -> None:
    done, left = job(tmp_path / "done", ("write", "x")), job(tmp_path / "left", ("fail", "75", "-"))
    work(done, left)
    told = work(done, left)
    assert (calls(done), calls(left), left.failure) == (["write x"], ["fail 75 -"] * 2, None)
    assert any("left for now" in step.note for step in told)


def test_a_job_that_another_process_does_is_left_to_it(tmp_path: Path) -> None:
    """The job itself holds the lock: it outlives a runner that is killed."""
    (tmp_path / JOB_NAME).write_text("{}")
    with claim(tmp_path / "job"), pytest.raises(Stopped, match="another deme process") as caught:
        do_job(tmp_path)
    assert caught.value.exit_code == 75


def test_two_at_once_have_both_begun_before_either_ends_and_no_third(tmp_path: Path) -> None:
    one, two = (
        job(tmp_path / name, ("meet", f"../{other}/started"), ("write", "x"), updates=20)
        for name, other in (("one", "two"), ("two", "one"))
    )
    (one.folder / "x.metrics.jsonl").write_text('{"step": 5}\n{"step": 10}\n')
    told = work(one, two, job(tmp_path / "three", ("write", "x")), at_once=2)
    assert {step.detail.split(" running")[0] for step in told if step.detail} <= {"0", "1", "2"}
    assert any(step.detail == "2 running, 10/40 updates" for step in told)
    assert [step.done for step in told if step.total] == sorted(s.done for s in told if s.total)


RUNNER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_jobs import Stopped, job, work_off
jobs = [job(Path(name), ("wait",), ("write", "x")) for name in sys.argv[1:]]
try:
    work_off(jobs, 2, lambda step: None)
except Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_stops_all_once_they_have_saved_and_the_next_run_finishes(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    """A terminal sends SIGINT to the whole group. After SIGKILL the jobs run on to their end."""
    names = [tmp_path / name for name in ("one", "two", "later")]
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER.format(tests=str(Path(__file__).parent)), *names],
        start_new_session=True,
    )

    def until(name: str) -> None:
        end = time.monotonic() + 30
        while not all((folder / name).exists() for folder in names[:2]):
            assert time.monotonic() < end
            time.sleep(0.02)

    until("started")
    os.killpg(runner.pid, sent)
    assert runner.wait(timeout=30) == code
    assert not (names[2] / "started").exists()
    if sent != signal.SIGKILL:
        until("saved")
        assert not any((folder / "x").exists() for folder in names)
    for folder in names:
        (folder / "go").touch()
    if sent == signal.SIGKILL:
        until("x")
    jobs = [job(folder, ("wait",), ("write", "x")) for folder in names]
    work(*jobs, at_once=2)
    assert all(one.is_done for one in jobs)
    assert len(calls(jobs[0])) == (2 if sent == signal.SIGKILL else 3), "done once"
    assert json.loads((names[0] / JOB_NAME).read_text()) == {"do": [["wait"], ["write", "x"]]}
