"""The runner: real processes, which find a small stand-in for deme in their own folder.

`python -m deme_cli` looks for its package in the current folder first. So a job brings PROGRAM with
it, whose commands cost a twentieth of a second; those that deme answers as fast (a missing file,
wrong usage) are deme's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deme_cli.comparison.jobs import DONE_NAME, SETTINGS_NAME, Command, Job
from deme_cli.comparison.work import Finished, Pulse, Work
from deme_cli.errors import Stopped
from deme_cli.jobs import claim

PROGRAM = """
import os, pathlib, signal, sys, time

def until(*paths):
    end = time.monotonic() + 20
    while not all(map(os.path.exists, paths)):
        time.sleep(0.01)
        if time.monotonic() > end:
            sys.exit("waited too long")

verb, *words = sys.argv[1:]
with open("calls.txt", "a") as calls:
    print(verb, *words, file=calls)
if verb == "write":
    pathlib.Path(words[0]).write_text("whole")
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
    def ask(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        asked.append(number)
    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    pathlib.Path("started").touch()
    end = time.monotonic() + 20
    while not os.path.exists("go"):
        time.sleep(0.01)
        if time.monotonic() > end:
            sys.exit("waited too long")
        if asked:
            time.sleep(0.5)
            pathlib.Path("saved").touch()
            sys.exit(75)
    pathlib.Path("waited").touch()
elif verb == "threads":
    print(os.environ["OMP_NUM_THREADS"], file=sys.stderr)
"""


def job(folder: Path, *commands: tuple[str, ...], needs: tuple[Path, ...] = ()) -> Job:
    """A job of the stand-in; a command's output is its last word."""
    files = {"deme_cli/__init__.py": "", "deme_cli/__main__.py": PROGRAM, SETTINGS_NAME: "{}"}
    made = tuple(Command(words, words[-1]) for words in commands)
    return Job(folder, folder.name, made, files, needs)


def calls(one: Job) -> list[str]:
    path = one.folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def finished(work: Work) -> dict[str, Finished]:
    return {one.job.title: one for one in work.run() if isinstance(one, Finished)}


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """SIGTERM is ignored should the runner not take it, so that a test fails, not the session."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def test_commands_run_one_after_another_and_needs_come_first(tmp_path: Path) -> None:
    training = job(tmp_path / "training", ("write", "a"), ("write", "b"))
    result = job(tmp_path / "result", ("meet", "../training/b"), needs=(training.folder,))
    work = Work([result, training, training], at_once=2)
    ended = [one.job.title for one in work.run() if isinstance(one, Finished)]
    assert ended == ["training", "result"]
    assert calls(training) == ["write a", "write b"]
    assert (result.is_done, work.failures, work.num_settled) == (True, {}, 2)
    assert (training.folder / SETTINGS_NAME).read_text() == "{}"


def test_a_failed_job_takes_those_that_need_it_along_and_no_other(tmp_path: Path) -> None:
    bad = job(tmp_path / "bad", ("fail", "5", "the loss is nan"), ("write", "b"))
    needy = job(tmp_path / "needy", ("write", "c"), needs=(bad.folder,))
    good = job(tmp_path / "good", ("write", "d"))
    after = job(tmp_path / "after", ("write", "e"), needs=(good.folder,))
    work = Work([bad, needy, good, after], at_once=1)
    ended = finished(work)
    assert ended["bad"].failure == work.failures[bad.folder] == work.failures[needy.folder]
    assert work.failures[bad.folder].message == "the loss is nan"
    assert work.failures[bad.folder].exit_code == 5
    assert calls(bad) == ["fail 5 the loss is nan"], "the next command is not begun"
    assert (calls(needy), needy.is_done, bad.is_done) == ([], False, False)
    assert (good.is_done, after.is_done) == (True, True)
    assert work.num_settled == 4


def test_what_deme_says_is_the_failure_and_its_exit_code_is_kept(tmp_path: Path) -> None:
    missing = Job(tmp_path / "a", "a", (Command(("inspect", "none.safetensors"), "x"),))
    usage = Job(tmp_path / "b", "b", (Command(("inspect", "--nonsense"), "x"),))
    work = Work([missing, usage], at_once=2)
    finished(work)
    assert work.failures[missing.folder].exit_code == 3
    assert work.failures[missing.folder].message == "none.safetensors: no such file"
    assert work.failures[usage.folder].exit_code == 2
    assert "none.safetensors" in (missing.folder / "log.txt").read_text()
    assert "--nonsense" in (usage.folder / "log.txt").read_text()


def test_a_killed_process_is_a_failure(tmp_path: Path) -> None:
    killed = job(tmp_path / "killed", ("die", "x"))
    work = Work([killed], at_once=1)
    finished(work)
    assert work.failures[killed.folder].exit_code == 1
    assert not killed.is_done


def test_the_log_holds_what_the_command_said(tmp_path: Path) -> None:
    bad = job(tmp_path / "bad", ("fail", "4", "out of luck"))
    finished(Work([bad], at_once=1))
    said = (bad.folder / "log.txt").read_text()
    assert said == "some words first\ndeme: out of luck\n"


def test_a_failed_job_is_tried_again_from_the_command_that_failed(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    finished(Work([job(folder, ("write", "a"), ("fail", "3", "no disk"))], at_once=1))
    mended = job(folder, ("write", "a"), ("write", "b"))
    work = Work([mended], at_once=1)
    assert finished(work)["one"].failure is None
    assert calls(mended) == ["write a", "fail 3 no disk", "write b"]


def test_a_finished_job_is_not_run_again(tmp_path: Path) -> None:
    one = job(tmp_path / "one", ("write", "a"))
    finished(Work([one], at_once=1))
    (one.folder / "a").unlink()
    work = Work([one], at_once=1)
    assert list(work.run()) == []
    assert calls(one) == ["write a"]
    assert work.num_settled == 1


def test_a_job_that_another_process_has_is_passed_by(tmp_path: Path) -> None:
    held = job(tmp_path / "held", ("write", "a"))
    needy = job(tmp_path / "needy", ("write", "b"), needs=(held.folder,))
    free = job(tmp_path / "free", ("write", "c"))
    work = Work([held, needy, free], at_once=1)
    with claim(held.folder / "job"):
        assert list(finished(work)) == ["free"], "and the run ends without it"
    assert (held.is_done, needy.is_done, work.failures) == (False, False, {})
    assert work.num_settled == 1
    assert set(finished(Work([held, needy, free], at_once=1))) == {"held", "needy"}


def test_two_processes_share_the_jobs_and_none_runs_twice(tmp_path: Path) -> None:
    jobs = [job(tmp_path / str(i), ("write", "a")) for i in range(4)]
    first, second = Work(jobs, at_once=1).run(), Work(jobs, at_once=1).run()
    assert isinstance(next(first), Pulse)
    assert isinstance(next(second), Pulse), "it has taken the next one"
    for _ in second:
        pass
    for _ in first:
        pass
    assert [calls(one) for one in jobs] == [["write a"]] * 4
    assert all(one.is_done for one in jobs)


def test_two_at_once_have_both_begun_before_either_ends(tmp_path: Path) -> None:
    one, two = (
        job(tmp_path / name, ("meet", f"../{other}/started", "none"))
        for name, other in (("one", "two"), ("two", "one"))
    )
    work, most = Work([one, two], at_once=2), 0
    for record in work.run():
        if isinstance(record, Pulse):
            most = max(most, len(record.running))
    assert work.failures == {}
    assert (one.is_done, two.is_done, most) == (True, True, 2)


def test_one_at_once_never_has_two_running(tmp_path: Path) -> None:
    jobs = [job(tmp_path / str(i), ("write", "a")) for i in range(3)]
    pulses = [one for one in Work(jobs, at_once=1).run() if isinstance(one, Pulse)]
    assert {len(one.running) for one in pulses} == {1}
    assert [one.settled for one in pulses] == sorted(one.settled for one in pulses)


def test_a_pulse_tells_the_updates_done(tmp_path: Path) -> None:
    one = job(tmp_path / "one", ("wait", "waited"))
    curves = one.folder / "ft_1of2.metrics.jsonl", one.folder / "ft_2of2.metrics.jsonl"
    one = Job(one.folder, "one", one.commands, one.files, curves=curves)
    one.folder.mkdir()
    curves[0].write_text('{"step": 5}\n{"step": 10}\n')
    for record in Work([one], at_once=1).run():
        if isinstance(record, Pulse):
            assert record.running == {"one": 10}, "the second has no curve yet"
            (one.folder / "go").touch()
    assert one.is_done


def test_the_cores_are_shared_out(tmp_path: Path) -> None:
    one = job(tmp_path / "one", ("threads", "x"))
    finished(Work([one], at_once=2))
    assert (one.folder / "log.txt").read_text().strip() == str(max(1, (os.cpu_count() or 1) // 2))


def test_a_signal_stops_all_once_they_have_saved_and_the_next_run_finishes(
    tmp_path: Path,
) -> None:
    jobs = [job(tmp_path / name, ("write", "a"), ("wait", "waited")) for name in ("one", "two")]
    later = job(tmp_path / "later", ("write", "b"))
    work = Work([*jobs, later], at_once=2)

    def run_until_both_wait() -> None:
        for _ in work.run():
            if all((one.folder / "started").exists() for one in jobs):
                os.kill(os.getpid(), signal.SIGTERM)

    with signals_kept(), pytest.raises(Stopped) as caught:
        run_until_both_wait()
    assert caught.value.exit_code == 75
    assert "run the same command again" in str(caught.value)
    assert all((one.folder / "saved").exists() for one in jobs), "it has waited for them"
    assert (calls(later), work.failures) == ([], {})
    assert not any(one.is_done for one in jobs)
    for one in jobs:
        (one.folder / "go").touch()
    again = finished(Work([*jobs, later], at_once=2))
    assert set(again) == {"one", "two", "later"}
    assert calls(jobs[0]) == ["write a", "wait waited", "wait waited"], "it goes on where it was"


def test_who_gives_up_the_run_leaves_no_process_behind(tmp_path: Path) -> None:
    one = job(tmp_path / "one", ("wait", "waited"))
    run = Work([one], at_once=1).run()
    while not (one.folder / "started").exists():
        next(run)
    run.close()
    assert (one.folder / "saved").exists()
    with claim(one.folder / "job"):
        pass


RUNNER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_work
jobs = [test_work.job(Path(name), ("wait", "waited")) for name in sys.argv[1:]]
from deme_cli.errors import Stopped
try:
    for _ in test_work.Work(jobs, at_once=2).run():
        pass
except Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


def test_ctrl_c_in_a_terminal_lets_every_job_save(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole group, to the jobs as well as to who runs them."""
    folders = [tmp_path / name for name in ("one", "two")]
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER.format(tests=str(Path(__file__).parent)), *folders],
        start_new_session=True,
    )
    end = time.monotonic() + 30
    while not all((folder / "started").exists() for folder in folders):
        assert time.monotonic() < end
        assert runner.poll() is None
        time.sleep(0.02)
    os.killpg(runner.pid, signal.SIGINT)
    assert runner.wait(timeout=30) == 130
    assert all((folder / "saved").exists() for folder in folders)
    assert not any((folder / DONE_NAME).exists() for folder in folders)
