"""Several processes on one journal, killed again and again. Run as a script, this file is a worker:
a search of a few milliseconds per trial, in which torch is never loaded.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from deme_cli.merging.coefficients import Point, Space
from deme_cli.merging.journal import Journal, Trial, read_journal
from deme_cli.merging.search import Search, Stage

SPACE = Space(("1of3", "2of3", "3of3"), ((-0.5, 1.5),) * 3, (1 / 3,) * 3)
STAGES = [Stage("loss", 64, 12), Stage("kid", 64, 1)]


def search_of(name: str) -> Search:
    return Search(
        name, SPACE, STAGES, grid=((0.0, 0.3, 0.6, 1.0),) * 3 if name == "grid" else None, seed=3,
        evaluations=None, with_soup=True,
    )  # fmt: skip


def objective(stage: int, point: Point) -> float:
    """Not a number in a corner; the second stage ranks a little differently."""
    is_bad = min(point[:2]) > 0.9
    return (
        math.inf if is_bad else math.dist(point, (0.55, 0.2, 0.85)) ** 2 + 0.05 * stage * point[0]
    )


def work(path: Path, name: str, seconds: float) -> None:
    """One worker: each trial takes about `seconds`."""

    def evaluate(stage: int, point: Point, name: str) -> tuple[float, list[float]]:
        time.sleep(seconds * random.random() * 2)
        return objective(stage, point), list(point)

    with Journal(path, SPACE.labels, {"search": name}) as journal:
        search_of(name).run(journal, evaluate, lambda: None)
    assert "torch" not in sys.modules


def run_with_kills(path: Path, name: str, kills: int, seed: int, seconds: float) -> int:
    """Run two workers to the end with kills at random moments; check what came out, and count."""
    search, expected = search_of(name), list[Trial]()
    while (step := search.next(expected)) is not None:
        stage, point, role = step
        expected.append(Trial(len(expected), stage, point, objective(stage, point), True, role))

    def start() -> subprocess.Popen:
        command = [sys.executable, __file__, str(path), name, str(seconds)]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    draw, landed, crew = random.Random(seed), 0, [start(), start()]
    for moment in sorted(draw.sample(range(5, 2 * len(expected)), kills)):  # in lines
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") >= moment:
                break
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 2 * seconds))
        landed += crew[0].poll() is None
        crew[0].kill()
        crew.pop(0).communicate()
        crew.append(start())
    for process in crew:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    found = read_journal(path)[2]
    counts = Counter((one.stage, one.point) for one in found)
    assert max(counts.values()) == 1, "a trial was counted twice"
    assert {(t.stage, t.point, t.value, t.name) for t in found} == {
        (t.stage, t.point, t.value, t.name) for t in expected
    }
    assert [place.name for place in path.parent.iterdir()] == [path.name]
    return landed


def test_two_workers_that_are_killed_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    """Three kills at random moments of a grid of 64 points."""
    assert run_with_kills(tmp_path / "trials.jsonl", "grid", 3, seed=0, seconds=0.02) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid", "cmaes"])
def test_twenty_kills_lose_nothing_and_count_nothing_twice(name: str, tmp_path: Path) -> None:
    landed = run_with_kills(tmp_path / "trials.jsonl", name, 20, seed=1, seconds=0.05)
    assert landed >= 15, "a worker may be done before its turn comes"


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
