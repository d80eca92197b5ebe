"""Several processes on one journal, killed again and again. Run as a script, this file is a worker:
a search of a few milliseconds per trial, in which torch is never loaded.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from deme_cli.merging.coefficients import Point, Space
from deme_cli.merging.journal import Journal, Trial, ranked, read_journal
from deme_cli.merging.search import Search, Stage, open_search

TARGET = (0.55, 0.2, 0.85)
SPACE = Space(("1of3", "2of3", "3of3"), ((-0.5, 1.5),) * 3, (1 / 3,) * 3)
VALUES = (0.0, 0.3, 0.6, 1.0)
RUNGS = [Stage("loss", 64, 12), Stage("kid", 64, 1)]


def search_of(name: str) -> Search:
    return open_search(
        name, SPACE, RUNGS, grid=(VALUES,) * 3 if name == "grid" else None, seed=3,
        evaluations=None, with_soup=True,
    )  # fmt: skip


def objective(stage: int, point: Point) -> float:
    """Not a number in a corner; the second stage ranks a little differently."""
    if min(point[:2]) > 0.9:
        return math.nan
    return math.dist(point, TARGET) ** 2 + 0.05 * stage * point[0]


def alone(search: Search) -> list[Trial]:
    """The trials of a run that nobody interrupts."""
    asked: list[Trial] = []
    while (step := search.next(asked)) is not None:
        assert isinstance(step, tuple)
        value = objective(step[0], step[1])
        value = value if math.isfinite(value) else math.inf
        asked.append(Trial(len(asked), step[0], step[1], value, step[2]))
    return asked


def work(path: Path, name: str, seconds: float) -> None:
    """One worker: each trial takes about `seconds`."""

    def evaluate(stage: int, point: Point, name: str) -> tuple[float, list[float]]:
        time.sleep(seconds * random.random() * 2)
        return objective(stage, point), list(point)

    with Journal(path, SPACE.labels, {"search": name}) as journal:
        for _ in search_of(name).run(journal, evaluate, lambda: None):
            pass
    assert "torch" not in sys.modules


class Crew:
    """Two workers; `kill` ends the one that has worked longer and starts another."""

    def __init__(self, path: Path, name: str, seconds: float) -> None:
        self._command = [sys.executable, __file__, str(path), name, str(seconds)]
        self.processes = [self._start(), self._start()]

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(self._command, stderr=subprocess.PIPE)

    def kill(self) -> bool:
        """Whether there was one to kill."""
        victim = self.processes.pop(0)
        was_alive = victim.poll() is None
        victim.kill()
        victim.communicate()
        self.processes.append(self._start())
        return was_alive

    def finish(self) -> None:
        for process in self.processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_with_kills(path: Path, name: str, kills: int, seed: int, seconds: float) -> dict[str, int]:
    """Run to the end with kills at random moments; check what came out, and count."""
    search = search_of(name)
    expected = alone(search)
    draw = random.Random(seed)
    moments = sorted(draw.sample(range(5, 2 * len(expected)), kills))  # in lines of the journal
    crew, landed = Crew(path, name, seconds), 0
    for moment in moments:
        deadline = time.monotonic() + 60
        while lines_of(path) < moment and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 2 * seconds))
        landed += crew.kill()
    crew.finish()
    *_, asked, _ = read_journal(path)
    counts = Counter((one.stage, one.point) for one in asked)
    assert max(counts.values()) == 1, "a trial was counted twice"
    values = {(one.stage, one.point): (one.value, one.name) for one in asked}
    assert values == {(one.stage, one.point): (one.value, one.name) for one in expected}
    upper = [[t for t in trials if t.stage == 1] for trials in (asked, expected)]
    assert ranked(upper[0])[0].point == ranked(upper[1])[0].point
    assert [place.name for place in path.parent.iterdir()] == [path.name]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    begun = sum(line["op_code"] == 4 for line in lines)
    return {"kills": landed, "trials": len(asked), "lost": begun - len(asked), "lines": len(lines)}


def test_two_workers_that_are_killed_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    """Three kills at random moments of a grid of 64 points; the same best as alone."""
    found = run_with_kills(tmp_path / "trials.jsonl", "grid", 3, seed=0, seconds=0.02)
    assert found["kills"] == 3
    assert found["trials"] > 64 + 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid", "cmaes"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_twenty_kills_lose_nothing_and_count_nothing_twice(
    name: str, seed: int, tmp_path: Path
) -> None:
    found = run_with_kills(tmp_path / "trials.jsonl", name, 20, seed=seed, seconds=0.05)
    print(name, seed, found)
    assert found["kills"] >= 15, "a worker may be done before its turn comes"


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
