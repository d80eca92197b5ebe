"""The journal of trials: what it keeps, whom it belongs to, and what it survives."""

from __future__ import annotations

import json
import math
import random
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
from deme_cli.merging import journal as module
from deme_cli.merging.journal import STUDY, Journal, is_gone, read_journal, this_process
from deme_cli.merging.space import Trial

LABELS = ["1of2", "2of2"]
WHAT = {"method": "grid", "parents": ["a", "b"], "seed": 3}
POINT = (0.1 + 0.2, -1 / 3)  # numbers that a short notation would change
A_WORKER = """
import sys, time
from pathlib import Path
from deme_cli.merging.journal import Journal
what = {"method": "grid", "parents": ["a", "b"], "seed": 3}
journal = Journal(Path(sys.argv[1]), ["1of2", "2of2"], what)
journal.open(force=False)
with journal.asking():
    journal.start(0, (0.5, 0.25))
print("started", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "merged.trials.jsonl"


def opened(path: Path, *, force: bool = False, what: dict | None = None) -> Journal:
    journal = Journal(path, LABELS, what or WHAT)
    journal.open(force=force)
    return journal


def add(journal: Journal, point: tuple[float, ...], value: float, **extra: object) -> None:
    with journal.asking():
        number = journal.start(0, point)
    journal.finish(number, value, extra)


def write(path: Path, *values: float, what: dict | None = None, merged: bool = False) -> Journal:
    """A journal with a trial for each value."""
    journal = opened(path, what=what)
    for index, value in enumerate(values):
        add(journal, (index / 3, 1.0), value)
    if merged:
        journal.mark_merged("abc")
    return journal


def values_in(path: Path, **options: object) -> list[float]:
    return [trial.value for trial in opened(path, **options).trials()]


def test_trials_come_back_exactly_and_in_the_order_in_which_they_began(path: Path) -> None:
    journal = Journal(path, LABELS, WHAT)
    assert journal.open(force=False) == 0
    with journal.asking() as trials:
        assert trials == []
        first = journal.start(0, POINT, "base")
    with journal.asking() as trials:
        assert [(one.point, one.objective) for one in trials] == [(POINT, None)]
        second = journal.start(1, (2.5, -7.0))
    journal.finish(second, 5e-324, {"slopes": [0.1, 1 / 3]})
    journal.finish(first, 2 / 3)
    after = Journal(path, LABELS, WHAT)
    assert after.open(force=False) == 2
    assert after.trials() == journal.trials()
    assert [(t.index, t.stage, t.point, t.value, t.name) for t in after.trials()] == [
        (0, 0, POINT, 2 / 3, "base"), (1, 1, (2.5, -7.0), 5e-324, ""),
    ]  # fmt: skip
    assert after.trials()[1].extra == {"slopes": [0.1, 1 / 3]}
    assert all(0 < t.began <= t.ended <= time.time() for t in after.trials())
    assert read_journal(path) == (WHAT, LABELS, journal.trials(), None)
    assert [found.name for found in path.parent.iterdir()] == [path.name], "locks are gone"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_kept_as_infinity(path: Path, value: float) -> None:
    write(path, 1.0, value)
    assert values_in(path) == [1.0, math.inf]
    assert Journal(path, LABELS, WHAT).open(force=False) == 2, "broken trials are done"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({**WHAT, "seed": 4}, "seed"),
        ({**WHAT, "parents": ["b", "a"], "method": "tpe"}, "method, parents"),
        ({**WHAT, "new": 1}, "new"),
        ({"method": "grid"}, "parents, seed"),
    ],
)
def test_the_trials_of_another_search_are_refused_and_force_keeps_a_copy_of_them(
    path: Path, what: dict, words: str
) -> None:
    write(path, 1.0, 2.0, what={**WHAT, "bounds": ((0.0, 1.0),)})
    text, old = path.read_bytes(), path.with_name(f"{path.name}.old")
    assert values_in(path, what={**WHAT, "bounds": [[0.0, 1.0]]}) == [1.0, 2.0]
    with pytest.raises(ConfigError, match=rf"differ in {words}\); add --force"):
        opened(path, what={**what, "bounds": [[0.0, 1.0]]})
    assert path.read_bytes() == text
    assert values_in(path, what=what, force=True) == []
    assert old.read_bytes() == text


def test_force_goes_on_with_an_unfinished_search_and_repeats_a_finished_one(path: Path) -> None:
    write(path, 1.0, 2.0)
    assert values_in(path, force=True) == [1.0, 2.0], "without its merged file it is unfinished"
    write(path, merged=True)
    assert values_in(path) == [1.0, 2.0], "the merged file was removed: the trials still hold"
    assert values_in(path, force=True) == []
    assert len(list(path.parent.glob("*.old"))) == 1
    write(path, 5.0, merged=True)
    assert values_in(path, force=True) == []
    assert {p.suffix for p in path.parent.glob("*.old*")} == {".old", ".old2"}


@pytest.mark.parametrize(
    "text", ['{"index": 0, "x": [0]}\n', "a,b\n", "[]\n", '"op"\n', "\0", "torn"]
)
def test_a_file_that_is_no_journal_is_refused_and_put_aside_by_force(path: Path, text: str) -> None:
    path.write_text(text)
    for open_it in (opened, read_journal):
        with pytest.raises(ConfigError, match="no journal of trials"):
            open_it(path)
    assert path.read_text() == text
    assert values_in(path, force=True) == []
    assert path.with_name(f"{path.name}.old").read_text() == text


def test_a_study_of_another_name_is_no_search(path: Path) -> None:
    storage = JournalStorage(JournalFileBackend(str(path)))
    optuna.create_study(storage=storage, study_name="mine")
    with pytest.raises(ConfigError, match="holds no search of `deme merge`"):
        read_journal(path)
    with pytest.raises(MissingError, match="no such journal"):
        read_journal(path.with_name("none"))


@pytest.mark.parametrize("tail", [b'{"op_code": 6, "trial', b"\0\0\0", b"{", b"x" * 100_000])
def test_a_torn_last_line_is_cut_off_before_the_next(path: Path, tail: bytes) -> None:
    journal = write(path, 1.0, 2.0)
    path.write_bytes(path.read_bytes() + tail)
    assert [trial.value for trial in read_journal(path)[2]] == [1.0, 2.0]
    add(journal, (1.0, 1.0), 3.0)  # the search that was under way
    path.write_bytes(path.read_bytes() + tail)
    add(opened(path), (2.0, 1.0), 4.0)  # one that goes on
    assert values_in(path) == [1.0, 2.0, 3.0, 4.0]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_every_place_where_a_kill_can_tear_the_journal_leaves_whole_trials(path: Path) -> None:
    write(path, 1.0, math.nan, 3.0)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        done = [trial.value for trial in opened(path).trials() if trial.is_done]
        assert done == [1.0, math.inf, 3.0][: len(done)]
        add(opened(path), (9.0, 9.0), 9.0)
        assert values_in(path)[-1] == 9.0
    assert not list(path.parent.glob("*.damaged*"))


@pytest.mark.parametrize(
    ("damage", "most_lost"),
    [
        (lambda line: b'{"op_code": 6, "tri\n', 1),
        (lambda line: b"\0" * len(line) + b"\n", 1),
        (lambda line: line[: len(line) // 2] + line, 0),  # torn, and written again
        (lambda line: line[:-1] + line, 0),  # glued to its own copy
    ],
    ids=["torn", "zeros", "torn and again", "glued"],
)
def test_a_damaged_line_costs_no_other_trial_and_a_copy_is_kept(
    path: Path, damage: object, most_lost: int, capsys: pytest.CaptureFixture
) -> None:
    values = [float(i) for i in range(1, 13)]
    write(path, *values)
    whole = path.read_bytes().splitlines(keepends=True)
    for place in random.Random(0).sample(range(len(whole)), 8):
        spoilt = damage(whole[place])
        path.write_bytes(b"".join([*whole[:place], spoilt, *whole[place + 1 :]]))
        before = path.read_bytes()
        found = values_in(path)
        assert len(values) - len(found) <= most_lost
        assert set(found) <= set(values)
        (kept,) = path.parent.glob("*.damaged")
        assert kept.read_bytes() == before
        assert f"{len(found)} finished trials could be read" in capsys.readouterr().err
        assert values_in(path, force=True) == found, "with --force as well"
        kept.unlink()


def test_a_damaged_journal_is_not_mended_under_the_hands_of_others(
    path: Path, worker: subprocess.Popen
) -> None:
    write(path, 1.0, 2.0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-2], b"{\n", lines[-1]]))
    with pytest.raises(ArtifactError, match=r"1 of its lines are damaged.* run its search again"):
        read_journal(path)
    for force in (False, True):
        with pytest.raises(ArtifactError, match="another deme process works on it; wait"):
            opened(path, force=force)
    worker.kill()
    worker.wait()
    assert len(opened(path).trials()) >= 1


def test_optuna_opens_the_journal(path: Path) -> None:
    write(path, 3.0, 1.0, math.nan)
    study = optuna.load_study(
        study_name=STUDY, storage=JournalStorage(JournalFileBackend(str(path)))
    )
    assert study.best_value == 1.0
    assert study.best_params == {"1of2": 1 / 3, "2of2": 1.0}
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert set(study.user_attrs) == {"labels", "search"}


@pytest.mark.parametrize("what", ["ask", "write"])
def test_the_file_of_a_lock_whose_holder_was_killed_is_in_nobodys_way(
    path: Path, what: str
) -> None:
    path.with_name(f".{path.name}.{what}.lock").touch()
    write(path, 1.0)
    assert values_in(path) == [1.0]
    assert [found.name for found in path.parent.iterdir()] == [path.name]


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_trial_of_a_process_is_its_own_as_long_as_it_lives(
    path: Path, worker: subprocess.Popen, number: int
) -> None:
    journal = opened(path)
    worker.send_signal(signal.SIGSTOP)
    for _ in range(2):
        with journal.asking() as trials:
            assert [(t.point, t.objective) for t in trials] == [((0.5, 0.25), None)]
    with pytest.raises(ConfigError, match="in use by another deme process"):
        opened(path, what={"other": 1}, force=True)
    worker.send_signal(signal.SIGCONT)
    worker.send_signal(number)
    state = Path(f"/proc/{worker.pid}/stat")  # dead, though nobody waits for it yet
    while state.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    with journal.asking() as trials:
        assert trials == []
        again = journal.start(0, (0.5, 0.25))
    journal.finish(again, 1.0)
    assert [(t.index, t.value) for t in journal.trials()] == [(1, 1.0)]


def test_who_is_gone_is_known_by_machine_number_and_birth() -> None:
    own = this_process()
    host, pid, born = own.split(":")
    assert not is_gone(own, 0.0)
    assert is_gone(f"{host}:{pid}:{int(born) + 1}", time.time()), "its number was given again"
    assert is_gone(f"{host}:999999999:{born}", time.time())
    assert not is_gone(f"elsewhere:{pid}:{born}", time.time() - 60), "it cannot be asked"
    assert is_gone(f"elsewhere:{pid}:{born}", time.time() - 3600)
    assert is_gone("0123456789abcdef", time.time()), "as an older deme called them"


def test_a_trial_given_back_or_taken_for_lost_is_free_and_counts_once(path: Path) -> None:
    journal, other = opened(path), opened(path)
    with journal.asking():
        number = journal.start(0, POINT)
    journal.give_back(number)
    assert journal.trials() == []
    add(other, POINT, 1.0)
    journal.finish(number, 7.0)  # too late: nobody waits for it
    with journal.asking():
        twice = journal.start(0, POINT)  # as where a lock was lost
    journal.finish(twice, 1.0)
    found: list[Trial] = opened(path).trials()
    assert [(t.index, t.value) for t in found] == [(1, 1.0)]


def test_one_process_writes_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, other = write(path, 1.0), opened(path)
    assert journal.take_the_end() is True
    with monkeypatch.context() as patch:
        patch.setattr(module, "this_process", lambda: "elsewhere:1:1")
        assert other.take_the_end() is None, "the first one lives"
    monkeypatch.setattr(module, "is_gone", lambda *process: True)
    assert other.take_the_end() is True, "it died before it wrote the end"
    other.mark_merged("abc")
    assert journal.take_the_end() is False


def test_a_place_that_takes_no_files_is_told_of(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MissingError, match="part of this path is a file"):
        opened(blocked / "trials.jsonl")
