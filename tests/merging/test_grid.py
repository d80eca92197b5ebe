from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from deme_cli.errors import ConfigError, NumericsError
from deme_cli.merging.grid import grid_points, parse_grid, resolve_grid
from deme_cli.merging.search import evaluate_points
from deme_cli.merging.trials import Trial, TrialLog, ranked

TARGET = (0.5, 0.25, 1.0)
GRID = ((0.0, 0.5, 1.0), (0.0, 0.25), (0.0, 1.0))


def distance(point: tuple[float, ...]) -> float:
    return math.dist(point, TARGET)


def run(path: Path, evaluate=distance, *, force: bool = False, search=None) -> list[Trial]:
    log = TrialLog(path, search or {"grid": GRID})
    points = grid_points(GRID)
    log.open(points, force=force)
    return list(evaluate_points(evaluate, points, log))


def test_values_are_given_for_all_experts_or_for_each() -> None:
    assert resolve_grid(parse_grid("0,0.5,1"), 3) == ((0.0, 0.5, 1.0),) * 3
    assert resolve_grid(parse_grid("1,0;0.5,0.5"), 2) == ((0.0, 1.0), (0.5,))
    assert resolve_grid([[0, 1], [0.5]], 2) == ((0.0, 1.0), (0.5,))


def test_the_default_grid_is_affordable() -> None:
    sizes = [len(grid_points(resolve_grid(None, count))) for count in range(1, 9)]
    assert sizes == [3, 9, 28, 82, 33, 65, 129, 257]
    with pytest.raises(ConfigError, match="9 experts make 512 candidates"):
        resolve_grid(None, 9)


def test_points_are_the_base_the_mean_and_the_product_once_each() -> None:
    points = grid_points(GRID)
    assert points[0] == (0.0, 0.0, 0.0)
    assert points[1] == (1 / 3, 1 / 3, 1 / 3)
    assert set(points) == {points[1], *itertools.product(*GRID)}
    assert len(points) == len(set(points)) == 13


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0, 1]], "1 lists of values for 2 experts"),
        ([], "expected a list of finite numbers"),
        ([0, "a"], "expected a list of finite numbers"),
        ([0, math.nan], "expected a list of finite numbers"),
        ([[0, 1], 2], "expected a list of finite numbers"),
        ([i / 1001 for i in range(1001)], "1002001 candidates"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(values: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_grid(values, 2)
    with pytest.raises(ConfigError, match="--grid 'a,1'"):
        parse_grid("0;a,1")


def test_the_winner_is_that_of_brute_force(tmp_path: Path) -> None:
    trials = run(tmp_path / "trials.jsonl")
    assert ranked(trials)[0].coefficients == min(itertools.product(*GRID), key=distance)
    bests = list(itertools.accumulate((trial.objective for trial in trials), min))
    assert [trial.best for trial in trials] == bests


def test_among_equals_the_shortest_coefficients_win(tmp_path: Path) -> None:
    trials = run(tmp_path / "trials.jsonl", lambda point: 0.0 if sum(point) > 0.4 else 1.0)
    assert ranked(trials)[0].coefficients == (0.5, 0.0, 0.0)


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_a_search_that_goes_on_equals_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    whole = run(tmp_path / "whole.jsonl")
    done: list[tuple[float, ...]] = []

    def interrupted(point: tuple[float, ...]) -> float:
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(point)
        return distance(point)

    path = tmp_path / "trials.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, interrupted)
    path.write_text(path.read_text() + '{"index": 99, "coeff')  # torn by a kill
    asked: list[tuple[float, ...]] = []
    again = run(path, lambda point: (asked.append(point), distance(point))[1])
    assert again == whole
    assert asked == grid_points(GRID)[stop:]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_search_is_repeated_only_by_force(tmp_path: Path) -> None:
    path, asked = tmp_path / "trials.jsonl", []
    run(path)
    log = TrialLog(path, {"grid": GRID})
    log.open(grid_points(GRID), force=True)
    assert len(log.values) == 13, "a search without its merged file is unfinished: it goes on"
    log.finish("abc")
    log = TrialLog(path, {"grid": GRID})
    log.open(grid_points(GRID), force=False)
    assert len(log.values) == 13, "the merged file was removed: the trials still hold"
    log.finish("abc")
    run(path, lambda point: (asked.append(point), distance(point))[1], force=True)
    assert len(asked) == 13


def test_trials_of_another_search_are_never_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    run(path)
    with pytest.raises(ConfigError, match=r"trials of another search.*--force"):
        run(path, search={"grid": GRID, "objective": "fid"})
    trials = run(path, lambda point: 1.0, force=True, search={"grid": GRID, "objective": "fid"})
    assert {trial.objective for trial in trials} == {1.0}
    path.write_text("not json\n")
    with pytest.raises(ConfigError, match="trials of another search"):
        run(path)


def test_what_is_not_finite_never_wins(tmp_path: Path) -> None:
    def broken(point: tuple[float, ...]) -> float:
        return math.nan if point[0] == 0.5 else -math.inf if point[1] else distance(point)

    trials = run(tmp_path / "trials.jsonl", broken)
    assert ranked(trials)[0].coefficients == min(
        (p for p in itertools.product(*GRID) if p[0] != 0.5 and p[1] == 0), key=distance
    )
    assert run(tmp_path / "trials.jsonl", broken) == trials, "infinity survives the log"
    with pytest.raises(NumericsError, match="not finite for any candidate"):
        ranked(run(tmp_path / "nothing.jsonl", lambda point: math.nan))
