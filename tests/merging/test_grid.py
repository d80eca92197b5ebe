"""The points of a grid search, and who wins among them."""

from __future__ import annotations

import itertools
import math

import pytest

from deme_cli.config import parse_lists
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.merging.search import open_search
from deme_cli.merging.space import Point, Space, Trial, grid_points, ranked, resolve_grid
from deme_cli.merging.successive_halving import Stage

TARGET = (0.5, 0.25, 1.0)
GRID = ((0.0, 0.5, 1.0), (0.0, 0.25), (0.0, 1.0))
SPACE = Space(("1of3", "2of3", "3of3"), ((-0.5, 1.5),) * 3, (1 / 3,) * 3)


def distance(point: Point) -> float:
    return math.dist(point, TARGET)


def run(evaluate=distance) -> list[Trial]:
    search = open_search("grid", SPACE, [Stage("loss", 16, 1)], grid=GRID, seed=0, evaluations=None)
    trials: list[Trial] = []
    while (step := search.next(trials)) is not None:
        value = evaluate(step[1])
        value = value if math.isfinite(value) else math.inf
        trials.append(Trial(len(trials), step[0], step[1], value, step[2]))
    return trials


def test_values_are_given_for_all_experts_or_for_each() -> None:
    assert resolve_grid(parse_lists("0,0.5,1", "--grid"), 3) == ((0.0, 0.5, 1.0),) * 3
    assert resolve_grid(parse_lists("1,0;0.5,0.5", "--grid"), 2) == ((0.0, 1.0), (0.5,))
    assert resolve_grid([[0, 1], [0.5]], 2) == ((0.0, 1.0), (0.5,))


def test_the_default_grid_is_affordable() -> None:
    sizes = [len(grid_points(resolve_grid(None, count))) for count in range(1, 9)]
    assert sizes == [3, 9, 27, 81, 32, 64, 128, 256]
    with pytest.raises(ConfigError, match="9 experts make 512 candidates"):
        resolve_grid(None, 9)


def test_points_are_those_of_the_grid_and_no_others() -> None:
    """The mean of N experts is the search's own; of D numbers, 1/D each would be none."""
    assert grid_points(GRID) == sorted(set(itertools.product(*GRID)))


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
        parse_lists("0;a,1", "--grid")


def test_the_base_the_mean_and_the_grid_are_tried_in_this_order() -> None:
    trials = run()
    grid = [point for point in itertools.product(*GRID) if point != SPACE.base]
    assert [trial.point for trial in trials] == [SPACE.base, SPACE.mean, *grid]
    assert [trial.name for trial in trials[:3]] == ["base", "1/N each", ""]


def test_the_winner_is_that_of_brute_force() -> None:
    trials = run()
    assert ranked(trials)[0].point == min(itertools.product(*GRID), key=distance)


def test_among_equals_the_shortest_coefficients_win() -> None:
    trials = run(lambda point: 0.0 if sum(point) > 0.4 else 1.0)
    assert ranked(trials)[0].point == (0.5, 0.0, 0.0)


def test_what_is_not_finite_never_wins() -> None:
    def broken(point: Point) -> float:
        return math.nan if point[0] == 0.5 else -math.inf if point[1] else distance(point)

    assert ranked(run(broken))[0].point == min(
        (p for p in itertools.product(*GRID) if p[0] != 0.5 and p[1] == 0), key=distance
    )
    with pytest.raises(NumericsError, match="not finite for any candidate"):
        ranked(run(lambda point: math.nan))
