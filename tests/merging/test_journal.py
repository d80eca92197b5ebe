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
from deme_cli.merging.journal import STUDY, Journal, read_journal

LABELS = ["1of2", "2of2"]
WHAT = {"method": "grid", "parents": ["a", "b"], "seed": 3}
POINT = (0.1 + 0.2, -1 / 3)  # numbers that a short notation would change
A_WORKER = """
import sys, time
from pathlib import Path
from deme_cli.merging.journal import Journal
what = {"method": "grid", "parents": ["a", "b"], "seed": 3}
with Journal(Path(sys.argv[1]), ["1of2", "2of2"], what) as journal:
    with journal.asking():
        journal.start(0, (0.5, 0.25))
    print("started", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "merged.trials.jsonl"


def opened(path: Path, *, force: bool = False, what: dict | None = None) -> Journal:
    return Journal(path, LABELS, what or WHAT, force=force)


def add(journal: Journal, point: tuple[float, ...], value: float) -> None:
    with journal.asking():
        number = journal.start(0, point)
    journal.finish(number, value)


def write(path: Path, *values: float, what: dict | None = None) -> None:
    """A journal with a trial for each value."""
    with opened(path, what=what) as journal:
        for index, value in enumerate(values):
            add(journal, (index / 3, 1.0), value)


def values_in(path: Path, **options: object) -> list[float]:
    with opened(path, **options) as journal:
        return [trial.value for trial in journal.trials()]


def test_trials_come_back_exactly_and_in_the_order_in_which_they_began(path: Path) -> None:
    began = time.time()
    with opened(path) as journal:
        with journal.asking() as trials:
            assert trials == []
            first = journal.start(0, POINT, "base")
        with journal.asking() as trials:
            assert [(one.point, one.is_done) for one in trials] == [(POINT, False)]
            second = journal.start(1, (2.5, -7.0))
        journal.finish(second, 5e-324, [0.1, 1 / 3])
        journal.finish(first, 2 / 3)
        kept = journal.trials()
    assert [(t.index, t.stage, t.point, t.value, t.name, t.slopes) for t in kept] == [
        (0, 0, POINT, 2 / 3, "base", None), (1, 1, (2.5, -7.0), 5e-324, "", (0.1, 1 / 3)),
    ]  # fmt: skip
    assert all(0 < t.seconds < time.time() - began for t in kept)
    assert read_journal(path) == (WHAT, LABELS, kept, None)
    assert [found.name for found in path.parent.iterdir()] == [path.name], "locks are gone"
    with opened(path) as journal:
        assert journal.trials() == kept


def test_broken_trials_are_done_and_those_given_back_are_free_again(path: Path) -> None:
    write(path, 1.0, math.nan, -math.inf)
    assert values_in(path) == [1.0, math.inf, math.inf]
    with opened(path) as journal:
        with journal.asking():
            number = journal.start(0, POINT)
        journal.finish(number, None)
        assert len(journal.trials()) == 3
        assert all(trial.is_done for trial in journal.trials())


def test_the_trials_of_another_search_are_refused_and_force_keeps_a_copy_of_them(
    path: Path,
) -> None:
    what = {"parents": ["b", "a"], "method": "grid"}
    write(path, 1.0, 2.0, what={**WHAT, "bounds": ((0.0, 1.0),)})
    text, old = path.read_bytes(), path.with_name(f"{path.name}.old")
    assert values_in(path, what={**WHAT, "bounds": [[0.0, 1.0]]}) == [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"differ in parents, seed\); add --force"):
        values_in(path, what={**what, "bounds": [[0.0, 1.0]]})
    assert path.read_bytes() == text
    assert values_in(path, what={**WHAT, "bounds": [[0.0, 1.0]]}, force=True) == [1.0, 2.0]
    assert values_in(path, what=what, force=True) == []
    assert old.read_bytes() == text


@pytest.mark.parametrize("text", ['{"index": 0, "x": [0]}\n', "torn"])
def test_a_file_that_is_no_journal_is_refused_and_put_aside_by_force(path: Path, text: str) -> None:
    path.write_text(text)
    for read in (values_in, read_journal):
        with pytest.raises(ConfigError, match="no journal of trials"):
            read(path)
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


@pytest.mark.parametrize("tail", [b'{"op_code": 6, "trial', b"\0\0\0"])
def test_a_torn_last_line_is_cut_off_before_the_next(path: Path, tail: bytes) -> None:
    with opened(path) as journal:
        add(journal, (1.0, 1.0), 1.0)
        path.write_bytes(path.read_bytes() + tail)
        assert [trial.value for trial in read_journal(path)[2]] == [1.0]
        add(journal, (2.0, 1.0), 2.0)  # the search that was under way
    path.write_bytes(path.read_bytes() + tail)
    write(path, 3.0)  # one that goes on
    assert values_in(path) == [1.0, 2.0, 3.0]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_every_place_where_a_kill_can_tear_the_journal_leaves_whole_trials(path: Path) -> None:
    write(path, 1.0, math.nan, 3.0)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with opened(path) as journal, journal.asking() as trials:
            assert [one.value for one in trials] == [1.0, math.inf, 3.0][: len(trials)]
        write(path, 9.0)
        assert values_in(path)[-1] == 9.0
    assert not list(path.parent.glob("*.damaged*"))


@pytest.mark.parametrize(
    "damage", [lambda line: b'{"op_code": 6, "tri\n', lambda line: line[:-1] + line],
    ids=["torn", "glued"],
)  # fmt: skip
def test_a_damaged_line_keeps_what_stands_before_it_and_a_copy_of_the_whole(
    path: Path, damage: object, capsys: pytest.CaptureFixture
) -> None:
    write(path, *map(float, range(9)))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[12] = damage(lines[12])
    path.write_bytes(b"".join(lines))
    with pytest.raises(ArtifactError, match="line 13 is damaged; run its search again"):
        read_journal(path)
    assert [value for value in values_in(path) if value < math.inf] == [0.0, 1.0, 2.0, 3.0]
    assert path.with_name(f"{path.name}.damaged").read_bytes() == b"".join(lines)
    assert "line 13 is damaged; the trials before it are kept" in capsys.readouterr().err


def test_optuna_opens_the_journal(path: Path) -> None:
    write(path, 3.0, 1.0, math.nan)
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.load_study(study_name=STUDY, storage=storage)
    assert study.best_value == 1.0
    assert study.best_params == {"1of2": 1 / 3, "2of2": 1.0}
    assert set(study.user_attrs) == {"labels", "search"}


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


def test_the_trial_of_a_process_is_its_own_as_long_as_it_lives(
    path: Path, worker: subprocess.Popen
) -> None:
    worker.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match="in use by another deme process"):
        values_in(path, what={"other": 1}, force=True)
    with opened(path) as journal:
        with journal.asking() as trials:
            assert [(t.point, t.is_done) for t in trials] == [((0.5, 0.25), False)]
        worker.kill()
        worker.wait()
        with journal.asking() as trials:
            assert trials == []
            again = journal.start(0, (0.5, 0.25))
        journal.finish(again, 1.0)
        assert [(t.index, t.value) for t in journal.trials()] == [(1, 1.0)]
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_one_process_writes_the_end(path: Path) -> None:
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) > 2:
            raise TimeoutError("still at it")

    with opened(path) as journal, opened(path) as other:
        with journal.ending(lambda: None) as is_over:
            assert not is_over
            with pytest.raises(TimeoutError, match="still"), other.ending(check):
                pass
            journal.mark_merged("abc")
        with other.ending(lambda: None) as is_over:
            assert is_over


def test_a_place_that_takes_no_files_is_told_of(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MissingError, match="part of this path is a file"):
        values_in(blocked / "trials.jsonl")
