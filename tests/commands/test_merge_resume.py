"""A search that is stopped, shared or finished: the same command again, and its neighbours."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import Result

from deme_cli.artifacts import MergedRecord, read_record
from deme_cli.errors import ConfigError, Stopped
from deme_cli.merging.journal import read_journal

PAIR = ("ft_1of4.safetensors", "ft_3of4.safetensors")
GRID = ("--search", "grid", "--grid", "0,0.2,0.4,0.6,0.8,1", "--num", "64", "--no-report")
MERGED, JOURNAL = Path("merged.safetensors"), Path("merged.trials.jsonl")


def tried(journal: Path) -> list[tuple]:
    """Point and value of each trial that counts, in order."""
    return [(*t.point, t.objective) for t in read_journal(journal)[2]]


def but_for_the_time(path: Path) -> MergedRecord:
    record = read_record(path, "merged")
    return replace(record, search={**record.search, "seconds": 0})


def stop_after(deme: Callable, trials: int, *words: object) -> Result:
    """Run the command; from the time the journal holds so many finished trials, send SIGTERM."""
    ended = threading.Event()

    def stop() -> None:
        done = 0
        while not ended.wait(0.002):
            if done < trials:
                done = JOURNAL.read_text().count('"op_code":6') if JOURNAL.exists() else 0
            else:
                os.kill(os.getpid(), signal.SIGTERM)
                ended.wait(0.05)  # again, should nobody have listened

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        return deme(*words)
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


SEARCHES = {
    "grid": GRID,
    "cmaes": ("--search", "cmaes", "--evaluations", "30", "--num", "64", "--no-report"),
    "gradient": ("--search", "gradient", "--evaluations", "9", "--per", "block", "--num", "128",
                 "--no-report"),
    "ladder": ("--search", "random", "--evaluations", "20", "--objective", "loss:4,kid@16",
               "--steps", "2", "--num", "64", "--no-report"),
}  # fmt: skip


@pytest.mark.parametrize("words", SEARCHES.values(), ids=SEARCHES)
def test_a_search_stopped_by_a_signal_ends_as_if_it_had_run_through(
    run_folder: Path, deme: Callable, words: tuple[str, ...]
) -> None:
    result = stop_after(deme, 4, "merge", *PAIR, *words)
    assert isinstance(result.exception, Stopped), "it was over before the signal came"
    assert result.exception.exit_code == 75
    assert "run the same command again" in str(result.exception)
    done = len([trial for trial in tried(JOURNAL) if trial[-1] is not None])
    assert done >= 4
    assert f"{done} trials are saved in {JOURNAL}" in str(result.exception)
    assert not MERGED.exists()
    again = deme("merge", *PAIR, *words)
    assert again.exit_code == 0, repr(again.exception)
    assert f"continuing after {done} trials" in again.stderr
    whole = deme("merge", *PAIR, *words, "-o", "whole.safetensors")
    assert whole.exit_code == 0
    assert tried(JOURNAL) == tried(Path("whole.trials.jsonl"))
    assert but_for_the_time(MERGED) == but_for_the_time(Path("whole.safetensors"))


def test_a_search_stopped_in_its_report_measures_it_again(run_folder: Path, deme: Callable) -> None:
    words = ("merge", *PAIR, "--search", "grid", "--grid", "0,0.5", "--num", "32")
    Path("deme.toml").write_text(
        "[merge]\nreport_num = 2000\nreport_repeats = 9\nbatch_size = 32\n"
    )
    result = stop_after(deme, 6, *words)  # its six trials, soup included
    assert isinstance(result.exception, Stopped), repr(result.exception)
    assert not MERGED.exists()
    count = len(tried(JOURNAL))
    Path("deme.toml").write_text("[merge]\nreport_num = 8\nreport_repeats = 2\n")
    again = deme(*words)
    assert again.exit_code == 0, repr(again.exception)
    assert len(tried(JOURNAL)) == count
    assert read_record(MERGED).report["protocols"][0]["num"] == 8


def run_beside(*words: object) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-m", "deme_cli", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_share_a_search_and_end_with_one_file(run_folder: Path) -> None:
    words = ("merge", *PAIR, "--search", "grid", "--grid", "0,0.3,0.6,1", "--num", "1024",
             "--no-report", "--json")  # fmt: skip
    both = [run_beside(*words) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    documents = [json.loads(out) for out, _ in ended]
    assert {document["path"] for document in documents} == {str(MERGED)}
    _, _, trials, merged = read_journal(JOURNAL)
    points = [trial.point for trial in trials]
    assert len(set(points)) == len(points) == 16 + 1, "a trial was missed or done twice"
    lines = [json.loads(line) for line in JOURNAL.read_text().splitlines()]
    workers = {line["user_attrs"]["worker"] for line in lines if line["op_code"] == 4}
    assert len(workers) == 2, "one did all the work"
    told = "written by another process"
    assert sorted(told in error for _, error in ended) == [False, True]
    assert read_record(MERGED).fingerprint == merged
    assert not list(run_folder.glob(".*"))


def test_a_finished_search_is_repeated_only_with_force(run_folder: Path, deme: Callable) -> None:
    words = ("merge", *PAIR, "--search", "grid", "--grid", "0,0.5", "--num", "16", "--no-report")
    assert deme(*words).exit_code == 0
    first, journal = MERGED.read_bytes(), JOURNAL.read_bytes()
    refused = deme(*words)
    assert isinstance(refused.exception, ConfigError)
    assert "exists; add --force" in str(refused.exception)
    assert (MERGED.read_bytes(), JOURNAL.read_bytes()) == (first, journal)
    assert "continuing" not in deme(*words, "--force").stderr, "all trials are made again"
    assert len(tried(JOURNAL)) == 4
    MERGED.unlink()
    again = deme(*words)
    assert again.exit_code == 0
    assert "continuing after 4 trials" in again.stderr, "the trials are there, the file is not"
    assert MERGED.exists()


@pytest.mark.parametrize(
    ("words", "differs"),
    [
        ((*PAIR[:1], "ft_2of4.safetensors", "--grid", "0,0.5"), "parents"),
        ((*PAIR[::-1], "--grid", "0,0.5"), "parents"),
        ((*PAIR, "--grid", "0,1"), "grid"),
        ((*PAIR, "--grid", "0,0.5", "--seed", "7"), "seed"),
        ((*PAIR, "--grid", "0,0.5", "--num", "17"), "objectives"),
        ((*PAIR, "--grid", "0,0.5", "--method", "ties"), "combination"),
        ((*PAIR, "--grid", "0,0.5", "--coefficients-for", "conv_in.*=1,1"), "fixed"),
    ],
)
def test_the_journal_of_another_search_is_kept_and_what_differs_is_named(
    run_folder: Path, deme: Callable, words: tuple[str, ...], differs: str
) -> None:
    first = ("merge", *PAIR, "--search", "grid", "--grid", "0,0.5", "--num", "16", "--no-report")
    assert deme(*first).exit_code == 0
    MERGED.unlink()
    before = JOURNAL.read_bytes()
    other = ("merge", "--search", "grid", "--num", "16", "--no-report", *words)
    result = deme(*other)
    assert isinstance(result.exception, ConfigError), repr(result.exception)
    assert "holds the trials of another search" in str(result.exception)
    assert differs in str(result.exception)
    assert "--force" in str(result.exception)
    assert "\n" not in str(result.exception)
    assert JOURNAL.read_bytes() == before
    assert not MERGED.exists()
    assert deme(*other, "--force").exit_code == 0


def test_more_evaluations_go_on_from_those_there_are(run_folder: Path, deme: Callable) -> None:
    words = ("merge", *PAIR, "--search", "random", "--num", "16", "--no-report")
    assert deme(*words, "--evaluations", "3").exit_code == 0
    few = tried(JOURNAL)
    MERGED.unlink()
    assert deme(*words, "--evaluations", "8").exit_code == 0
    assert tried(JOURNAL)[: len(few)] == few
    assert len(tried(JOURNAL)) == len(few) + 5


def test_what_is_tried_is_shown_while_it_runs_and_when_it_has_ended(
    run_folder: Path, deme: Callable
) -> None:
    stop_after(deme, 4, "merge", *PAIR, *GRID)
    shown = deme("merge", "--show", JOURNAL)
    assert shown.exit_code == 0, repr(shown.exception)
    assert "not finished" in shown.stderr
    (picture,) = shown.stdout.split()
    assert picture.startswith("merged.")
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    document = json.loads(deme("merge", "--show", JOURNAL, "--json").stdout)
    assert document["finished"] is False
    assert len(document["trials"]) >= 4
    assert document["trials"][0]["name"] == "base"
    assert document["trials"][0]["coefficients"] == {"1of4": 0, "3of4": 0}
    assert document["best"] == min(document["trials"], key=lambda trial: trial["objective"])
    deme("merge", *PAIR, *GRID)
    ended = json.loads(deme("merge", "--show", MERGED, "--json").stdout)
    assert ended["finished"] is True
    assert len(ended["trials"]) == 36 + 1
    shutil.move(JOURNAL, "elsewhere.jsonl")
    result = deme("merge", "--show", MERGED)
    assert "no journal of its search beside it" in str(result.exception)
    assert result.exception.exit_code == 3
