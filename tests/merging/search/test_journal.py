"""The journal of trials: what it keeps, whom it belongs to, and what it survives."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.merging.search.journal import Journal, asked_trials
from deme_cli.merging.search.journal_file import STUDY, read_journal
from deme_cli.merging.search.trials import Asked, Trial

LABELS = ["1of2", "2of2"]
WHAT = {"method": "grid", "parents": ["a", "b"], "seed": 3}
POINT = (0.1 + 0.2, -1 / 3)  # numbers that a short notation would change
A_WORKER = """
import sys, time
from pathlib import Path
from deme_cli.merging.search.journal import Journal
what = {"method": "grid", "parents": ["a", "b"], "seed": 3}
with Journal(Path(sys.argv[1]), ["1of2", "2of2"], what) as journal:
    journal.open(force=False)
    with journal.planning():
        journal.start(0, (0.5, 0.25))
    print("started", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "merged.trials.jsonl"


def add(journal: Journal, point: tuple[float, ...], value: float, **extra: object) -> Trial:
    with journal.planning():
        trial = journal.start(0, point)
    return journal.finish(trial, value, extra)


def write(
    path: Path, *values: float, what: dict | None = None, merged: bool = False
) -> list[Asked]:
    """A journal with a trial for each value."""
    with Journal(path, LABELS, what or WHAT) as journal:
        journal.open(force=False)
        for index, value in enumerate(values):
            add(journal, (index / 3, 1.0), value)
        if merged:
            journal.mark_merged("abc")
        return journal.asked()


def reopen(path: Path, *, force: bool = False, what: dict | None = None) -> tuple[int, list[Asked]]:
    with Journal(path, LABELS, what or WHAT) as journal:
        return journal.open(force=force), journal.asked()


def test_trials_come_back_exactly_and_in_the_order_in_which_they_began(path: Path) -> None:
    with Journal(path, LABELS, WHAT) as journal:
        assert journal.open(force=False) == 0
        with journal.planning() as asked:
            assert asked == []
            first = journal.start(0, POINT, "base")
        with journal.planning() as asked:
            assert [(one.point, one.value) for one in asked] == [(POINT, None)]
            second = journal.start(1, (2.5, -7.0))
        done = journal.finish(second, 5e-324, {"slopes": [0.1, 1 / 3]})
        assert (done.rung, done.point, done.objective, done.best) == (
            1,
            (2.5, -7.0),
            5e-324,
            5e-324,
        )
        assert journal.finish(first, 2 / 3).name == "base"
        before = journal.asked()
    count, after = reopen(path)
    assert count == 2
    assert after == before
    assert [(one.number, one.rung, one.point, one.value, one.name) for one in after] == [
        (0, 0, POINT, 2 / 3, "base"), (1, 1, (2.5, -7.0), 5e-324, ""),
    ]  # fmt: skip
    assert after[1].extra == {"slopes": [0.1, 1 / 3]}
    assert all(0 < one.began <= one.ended <= time.time() for one in after)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_kept_as_infinity(path: Path, value: float) -> None:
    assert [one.value for one in write(path, 1.0, value)] == [1.0, math.inf]
    assert [one.value for one in reopen(path)[1]] == [1.0, math.inf]
    assert reopen(path)[0] == 2, "broken trials are done"


def test_a_search_may_be_described_with_tuples(path: Path) -> None:
    write(path, 1.0, what={"bounds": ((0.0, 1.0), (0.0, 1.0))})
    assert reopen(path, what={"bounds": [[0.0, 1.0], [0.0, 1.0]]})[0] == 1


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({**WHAT, "seed": 4}, "seed"),
        ({**WHAT, "parents": ["a", "c"]}, "parents"),
        ({**WHAT, "parents": ["b", "a"], "method": "tpe"}, "method, parents"),
        ({**WHAT, "new": 1}, "new"),
        ({"method": "grid"}, "parents, seed"),
    ],
)
def test_the_trials_of_another_search_are_refused_and_the_difference_named(
    path: Path, what: dict, words: str
) -> None:
    before = write(path, 1.0, 2.0)
    text = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"\(they differ in {words}\); add --force"):
        reopen(path, what=what)
    assert path.read_bytes() == text
    assert reopen(path) == (2, before), "nothing happened to them"
    assert reopen(path, what=what, force=True) == (0, [])


def test_force_goes_on_with_an_unfinished_search_and_repeats_a_finished_one(path: Path) -> None:
    before = write(path, 1.0, 2.0)
    assert reopen(path, force=True) == (2, before), "without its merged file it is unfinished"
    write(path, merged=True)
    assert reopen(path)[0] == 2, "the merged file was removed: the trials still hold"
    assert reopen(path, force=True) == (0, [])
    assert reopen(path, force=True) == (0, [])


def test_force_replaces_what_is_no_journal(path: Path) -> None:
    for content in (b"not json\n", b'{"index": 0}\n', b"torn", b"\x00" * 100 + b"\n", b"[1]\n5\n"):
        path.write_bytes(content)
        assert reopen(path, force=True) == (0, [])
        assert read_journal(path).search == WHAT


@pytest.mark.parametrize("line", ['{"index": 0, "coefficients": [0]}', "a,b", "[]", '"op"', "\0"])
def test_a_file_that_is_no_journal_is_refused(path: Path, line: str) -> None:
    path.write_text(f"{line}\n{line}\n")
    for open_it in (reopen, read_journal):
        with pytest.raises(ConfigError, match="no journal of trials"):
            open_it(path)
    assert path.read_text() == f"{line}\n{line}\n"


@pytest.mark.parametrize("tail", [b'{"op_code": 6, "trial', b"\0\0\0", b"{", b"x" * 100_000])
def test_a_torn_last_line_is_cut_off_before_the_next(path: Path, tail: bytes) -> None:
    before = write(path, 1.0, 2.0)
    sound = path.read_bytes()
    path.write_bytes(sound + tail)
    assert [trial.values for trial in read_journal(path).trials] == [[1.0], [2.0]]
    path.write_bytes(sound + tail)
    assert reopen(path) == (2, before)
    path.write_bytes(sound + tail)
    assert len(write(path, 3.0)) == 3
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_line_torn_while_the_journal_is_open_is_cut_off_as_well(path: Path) -> None:
    """By another worker that is killed while it writes."""
    with Journal(path, LABELS, WHAT) as journal:
        journal.open(force=False)
        with journal.planning():
            trial = journal.start(0, POINT)
        with path.open("ab") as file:
            file.write(b'{"op_code": 5, "worker')
        journal.finish(trial, 1.0)
        add(journal, (1.0, 1.0), 2.0)
        assert [one.value for one in journal.asked()] == [1.0, 2.0]
    assert reopen(path)[0] == 2


def test_every_place_where_a_kill_can_tear_the_journal_leaves_whole_trials(path: Path) -> None:
    write(path, 1.0, math.nan, 3.0)
    whole = path.read_bytes()
    for size in range(0, len(whole), 29):
        path.write_bytes(whole[:size])
        count, asked = reopen(path)
        assert [one.value for one in asked] in (
            [],
            [1.0],
            [1.0, math.inf],
            [1.0, math.inf, 3.0],
        ) or (asked[-1].value is None)
        with Journal(path, LABELS, WHAT) as journal:
            journal.open(force=False)
            with journal.planning() as asked:
                assert all(one.value is not None for one in asked), "its worker is gone"
                assert len(asked) == count


@pytest.mark.parametrize("place", ["middle", "end"])
def test_a_corrupt_line_is_told_of(path: Path, place: str) -> None:
    write(path, 1.0, 2.0)
    lines = path.read_bytes().splitlines(keepends=True)
    middle = len(lines) // 2 if place == "middle" else len(lines) - 1
    for wrong in (b'{"op_code": 6, "tri\n', b"[]\n", b'{"op_code": 77, "worker_id": "x"}\n'):
        path.write_bytes(b"".join([*lines[:middle], wrong, *lines[middle + 1 :]]))
        for open_it in (reopen, read_journal):
            with pytest.raises(ArtifactError, match=r"not a whole journal .* add --force"):
                open_it(path)
    assert reopen(path, force=True) == (0, [])


def test_a_search_that_was_killed_while_it_was_created_begins_anew(path: Path) -> None:
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for count in range(len(lines)):
        path.write_bytes(b"".join(lines[:count]))
        with pytest.raises(ConfigError, match="holds no search of `deme merge`"):
            read_journal(path)
        assert reopen(path) == (0, [])
        assert read_journal(path).labels == LABELS


def test_reading_a_journal_gives_what_was_searched(path: Path) -> None:
    with pytest.raises(MissingError, match="no such journal"):
        read_journal(path)
    asked = write(path, 1.0, math.nan)
    found = read_journal(path)
    assert (found.search, found.labels, found.merged) == (WHAT, LABELS, None)
    assert asked_trials(found.trials, found.labels) == asked
    write(path, merged=True)
    assert read_journal(path).merged == "abc"
    with Journal(path, LABELS, WHAT) as journal:
        journal.open(force=False)
        with journal.planning():
            journal.start(0, POINT)
        assert len(read_journal(path).trials) == 3, "also while somebody works on it"


def test_a_study_of_another_name_is_no_search(path: Path) -> None:
    storage = JournalStorage(JournalFileBackend(str(path)))
    optuna.create_study(storage=storage, study_name="mine")
    with pytest.raises(ConfigError, match="holds no search of `deme merge`"):
        read_journal(path)


def test_optuna_opens_the_journal(path: Path) -> None:
    write(path, 3.0, 1.0, math.nan)
    study = optuna.load_study(
        study_name=STUDY, storage=JournalStorage(JournalFileBackend(str(path)))
    )
    assert study.best_value == 1.0
    assert study.best_params == {"1of2": 1 / 3, "2of2": 1.0}
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert set(study.user_attrs) == {"labels", "search"}
    assert reopen(path)[0] == 3


@pytest.fixture
def worker(path: Path) -> Iterator[subprocess.Popen]:
    """Another process that has begun a trial."""
    process = subprocess.Popen(
        [sys.executable, "-c", A_WORKER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_trial_of_a_living_worker_is_its_own(path: Path, worker: subprocess.Popen) -> None:
    with Journal(path, LABELS, WHAT) as journal:
        assert journal.open(force=False) == 0
        for _ in range(3):
            with journal.planning() as asked:
                assert [(one.point, one.value) for one in asked] == [((0.5, 0.25), None)]
    worker.send_signal(signal.SIGSTOP)
    with Journal(path, LABELS, WHAT) as journal:
        journal.open(force=False)
        with journal.planning() as asked:
            assert len(asked) == 1, "a worker that sleeps is not dead"


def test_who_leaves_last_takes_the_lock_along(path: Path, worker: subprocess.Popen) -> None:
    lock = path.with_name(f".{path.name}.lock")
    reopen(path)
    assert lock.exists(), "a worker lives"
    worker.kill()
    worker.wait()
    reopen(path)
    read_journal(path)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_trial_of_a_dead_worker_returns(
    path: Path, worker: subprocess.Popen, number: int
) -> None:
    with Journal(path, LABELS, WHAT) as journal:
        journal.open(force=False)
        worker.send_signal(number)
        worker.wait()
        with journal.planning() as asked:
            assert asked == []
            trial = journal.start(0, (0.5, 0.25))
        journal.finish(trial, 1.0)
        assert [one.number for one in journal.asked()] == [1]
    states = [trial.state.name for trial in read_journal(path).trials]
    assert states == ["FAIL", "COMPLETE"]
    assert [p.name for p in path.parent.glob(".*.worker")] == [], "nothing of the dead is left"


def test_a_trial_given_back_is_free_at_once(path: Path) -> None:
    with Journal(path, LABELS, WHAT) as journal:
        journal.open(force=False)
        with journal.planning():
            trial = journal.start(0, POINT)
        journal.give_back(trial)
        assert journal.asked() == []
        assert add(journal, POINT, 1.0).index == 1


def test_a_place_that_takes_no_files_is_told_of(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with (
        pytest.raises(MissingError, match="part of this path is a file"),
        Journal(blocked / "trials.jsonl", LABELS, WHAT),
    ):
        pass
