"""Searches on objectives whose least point is known: how near they come, and who goes on.

A search is driven here as `Search.run` drives it, with a list in place of the journal.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import rankdata

from deme_cli.errors import ConfigError, NumericsError
from deme_cli.merging.coefficients import Grid, Point, Space, resolve_grid
from deme_cli.merging.journal import Trial, ranked
from deme_cli.merging.search import (
    BASE_NAME,
    FIRST_STEP,
    MEAN_NAME,
    SOUP_NAME,
    Search,
    Stage,
    conclude,
    parse_stages,
    rank_correlation,
    shortlist,
)

Function = Callable[[Point], float]
STAGES = [Stage("loss", 64, 6), Stage("kid", 1000, 3), Stage("fid", 5000, 1)]
METRICS = ["loss", "kid", "fid"]
TARGET = (0.9, 0.3)
SHAPE = np.array(((1.0, 0.6), (0.6, 0.8)))
SEARCHES = ("grid", "random", "cmaes", "tpe", "gradient")


def space_of(count: int, **fields: object) -> Space:
    names = tuple(f"{i}of{count}" for i in range(1, count + 1))
    return replace(Space(names, ((-0.5, 1.5),) * count, (1 / count,) * count), **fields)


def bent(point: Point) -> float:
    """1 + x.A.x around TARGET, as a loss near its least value, and terms of higher order."""
    x = np.array(point) - TARGET
    return float(1 + x @ SHAPE @ x + 0.2 * (x**3).sum() + 0.1 * (x**4).sum())


def broken(point: Point) -> float:
    """The same, not a number for large coefficients near its least point, and for small."""
    return math.nan if point[0] > 1 or point[1] < -0.2 else bent(point)


def slopes(point: Point) -> tuple[float, ...]:
    x = np.array(point) - TARGET
    return tuple(2 * SHAPE @ x + 0.6 * x**2 + 0.4 * x**3)


def search_of(
    name: str, space: Space, evaluations: int | None = None, grid: Grid | None = None,
    stages: Sequence[Stage] = STAGES[:1], **fields: object,
) -> Search:  # fmt: skip
    if name == "grid":
        grid = grid or resolve_grid(None, len(space.experts))
    return Search(name, space, stages, grid=grid, seed=3, evaluations=evaluations, **fields)


def done(number: int, step: tuple[int, Point, str], function: Function) -> Trial:
    """A trial as the journal has it once it is finished; each takes a second."""
    stage, point, name = step
    value = function(point)
    value = value if math.isfinite(value) else math.inf
    gradient = slopes(point) if len(point) == 2 and name != SOUP_NAME else None
    return Trial(number, stage, point, value, True, name, 1.0, gradient)


def drive(search: Search, function: Function) -> list[Trial]:
    """All trials of one worker that nobody interrupts."""
    asked: list[Trial] = []
    while (step := search.next(asked)) is not None:
        assert step != "wait", "alone there is nobody to wait for"
        asked.append(done(len(asked), step, function))
        assert len(asked) < 500
    return asked


def points_of(asked: Sequence[Trial], stage: int = 0) -> list[Point]:
    return [one.point for one in asked if one.stage == stage]


@pytest.mark.parametrize("function", [bent, broken], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("name", "share"),
    [("grid", 0.5), ("random", 0.12), ("cmaes", 0.02), ("tpe", 0.03), ("gradient", 1e-6)],
)
def test_a_search_comes_near_the_least_value_within_its_usual_budget(
    name: str, share: float, function: Function
) -> None:
    space = space_of(2)
    search = search_of(name, space)
    asked = drive(search, function)
    best = min(one.value for one in asked)
    assert (best - 1) / (function((0.5, 0.5)) - 1) < share
    assert len(asked) <= search.expected
    inside = [-0.5 <= w <= 1.5 for one in asked for w in one.point]
    assert all(inside)
    assert len(set(points_of(asked))) == len(asked), "no point is tried twice"
    assert drive(search_of(name, space), function) == asked, "the same from the same seed"
    for known in range(0, len(asked), 5):  # another process goes on
        step = search_of(name, space).next(asked[:known])
        assert step == (0, asked[known].point, asked[known].name)
    if name in ("tpe", "cmaes") and function is broken:
        late = [one.value for one in asked[len(asked) // 2 :]]
        assert np.isfinite(late).mean() > 0.5, "broken candidates are avoided, not only skipped"


def test_a_grid_is_tried_in_order_after_base_and_mean_and_the_winner_is_that_of_brute_force() -> (
    None
):
    grid = ((0.0, 0.5, 1.0), (0.0, 0.25), (0.0, 1.0))
    points, target = list(itertools.product(*grid)), (0.5, 0.25, 1.0)

    def tried(function: Function) -> list[Trial]:
        return drive(search_of("grid", space_of(3), grid=grid), function)

    trials = tried(lambda point: math.dist(point, target))
    assert points_of(trials) == [(0.0,) * 3, (1 / 3,) * 3, *points[1:]]
    assert [trial.name for trial in trials[:3]] == [BASE_NAME, MEAN_NAME, ""]
    assert ranked(trials)[0].point == min(points, key=lambda p: math.dist(p, target))
    equal = tried(lambda point: 0.0 if sum(point) > 0.4 else 1.0)
    assert ranked(equal)[0].point == (0.5, 0.0, 0.0), "among equals the shortest wins"
    with pytest.raises(NumericsError, match="not finite for any candidate"):
        ranked(tried(lambda point: math.nan))


def test_the_start_comes_first_or_the_first_generation_is_drawn_around_it() -> None:
    for name in ("random", "tpe", "gradient"):
        asked = drive(search_of(name, space_of(2, start=(0.25, -0.25)), 3), bent)
        assert asked[2].point == (0.25, -0.25)
    space = space_of(2, start=(1.25, -0.25), bounds=((-50, 50), (-50, 50)))
    asked = drive(search_of("cmaes", space, 6), lambda point: 1.0)[2:]
    assert np.linalg.norm(np.mean(points_of(asked), axis=0) - (1.25, -0.25)) < 25


def share_out(searches: Sequence[Search], function: Function, seed: int) -> list[Trial]:
    """Trials of workers whose steps alternate at random; some die in the middle of one."""
    draw, asked = random.Random(seed), list[Trial]()
    at_work: dict[int, int | None] = dict.fromkeys(range(len(searches)))
    for number in itertools.count():
        worker = draw.choice(list(at_work))
        place, at_work[worker] = at_work[worker], None
        if place is not None:
            (index,) = (i for i, one in enumerate(asked) if one.index == place)
            one = asked[index]
            if draw.random() < 0.15:
                del asked[index]
            else:
                asked[index] = done(one.index, (one.stage, one.point, one.name), function)
            continue
        step = searches[worker].next(list(asked))
        if step is None:
            del at_work[worker]
            if not at_work:
                return asked
        elif step == "wait":
            assert any(not one.is_done for one in asked), "nobody works, and all wait"
        else:
            at_work[worker] = number
            asked.append(Trial(number, *step[:2], name=step[2]))
    raise AssertionError


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", SEARCHES)
def test_workers_together_try_what_one_alone_tries(name: str, seed: int) -> None:
    """But for tpe, whose next point depends on what is known when it is asked for."""
    crew = [search_of(name, space_of(2), 20, with_soup=True) for _ in range(4)]
    alone = {trial.point: trial.value for trial in drive(crew.pop(), broken)}
    asked = share_out(crew, broken, seed)
    assert len(set(points_of(asked))) == len(asked) == len(alone), "none twice, none lost"
    if name != "tpe":
        assert {one.point: one.value for one in asked} == alone


@pytest.mark.parametrize("name", SEARCHES)
def test_a_raised_budget_goes_on_with_the_same_points(name: str) -> None:
    asked = drive(search_of(name, space_of(2), 5), bent)
    assert sum(not one.name for one in asked) <= 5
    assert drive(search_of(name, space_of(2), 7), bent)[: len(asked)] == asked


def recipe(function: Function, count: int) -> tuple[Point, list[Point]]:
    """Wortsman et al. 2022, recipe 1, in plain loops: the soup, and what was evaluated."""
    tried: list[Point] = []

    def held_out(ingredients: list[int]) -> float:
        soup = tuple(1 / len(ingredients) if i in ingredients else 0.0 for i in range(count))
        if soup not in tried:
            tried.append(soup)
        value = function(soup)
        return value if math.isfinite(value) else math.inf

    order = sorted(range(count), key=lambda i: held_out([i]))
    ingredients = [order[0]]
    for i in order[1:]:
        if held_out([*ingredients, i]) <= held_out(ingredients):
            ingredients.append(i)
    return tuple(1 / len(ingredients) if i in ingredients else 0.0 for i in range(count)), tried


@pytest.mark.parametrize("seed", range(4))
def test_the_greedy_soup_is_that_of_the_recipe(seed: int) -> None:
    count = 2 + seed
    draw = np.random.default_rng(seed)
    target, bad = draw.uniform(-0.2, 0.8, count), draw.integers(count)

    def function(point: Point) -> float:
        if seed == 3:
            return 1.0  # what does not raise the objective joins
        return math.nan if max(point) == 1 == point[bad] and seed == 0 else math.dist(point, target)

    soup, tried = recipe(function, count)
    search = search_of("random", space_of(count), 1, with_soup=True)
    asked = drive(search, function)
    assert search.soup == soup
    beside = {one.point for one in asked if one.name == SOUP_NAME}
    assert beside <= set(tried) <= beside | {search.base, search.mean}


@pytest.mark.parametrize("name", SEARCHES)
def test_where_every_candidate_is_broken_a_search_still_comes_to_its_end(name: str) -> None:
    asked = drive(search_of(name, space_of(2), 12), lambda point: math.nan)
    assert all(one.value == math.inf for one in asked)
    assert 2 <= len(asked) <= 14


def test_a_descent_is_that_of_scipy_and_ends_at_a_broken_point() -> None:
    space = space_of(2)
    first, scale = bent(space.start), FIRST_STEP / np.linalg.norm(slopes(space.start))
    asked_by_scipy: list[Point] = []

    def scaled(x: np.ndarray) -> tuple[float, np.ndarray]:
        asked_by_scipy.append(tuple(map(float, x)))
        return (bent(x) - first) * scale, np.array(slopes(x)) * scale

    minimize(
        scaled, space.start, jac=True, method="L-BFGS-B", bounds=space.box,
        options={"maxfun": 20, "ftol": 1e-5, "gtol": 1e-5},
    )  # fmt: skip
    search = search_of("gradient", space)
    asked = drive(search, bent)
    assert points_of(asked)[1:] == list(dict.fromkeys(asked_by_scipy))
    assert conclude(search, asked, ["loss"])[2] == []
    search = search_of("gradient", space)
    cliff = drive(search, lambda point: math.nan if point[0] > 0.55 else bent(point))
    assert cliff[-1].value == math.inf
    assert "not finite; set narrower bounds" in conclude(search, cliff, ["loss"])[2][0]


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("loss", [("loss", 2048, 10)]),
        ("kid@2.5k:3", [("kid", 2500, 3)]),
        (" loss:64,kid@1k:16 , fid@500", [("loss", 2048, 64), ("kid", 1000, 16), ("fid", 500, 10)]),
        ("", "objective '': expected loss, experts, kid, fid"),
        ("loss:4,", "objective '': expected"),
        ("loss:4@1k,fid", "objective 'loss:4@1k': expected"),
        ("loss,fid", "how many does it keep for the next"),
        ("loss:0,fid", "keeps 0; expected at least 1"),
        ("loss:4,kid:5,fid", "keeps 5; expected at most the 4"),
        ("fid@0", "0 is no number of draws"),
        ("fid@1.2345k", "1234.5 is no number of draws"),
    ],
)
def test_objectives_in_turn_read_as_stages_or_are_refused(text: str, stages: list | str) -> None:
    if isinstance(stages, str):
        with pytest.raises(ConfigError) as caught:
            parse_stages(text, num=2048)
        assert stages in str(caught.value)
        return
    found = parse_stages(text, num=2048)
    assert [(stage.name, stage.num, stage.keep) for stage in found] == stages
    assert [stage.is_distance for stage in found] == [name in ("kid", "fid") for name, *_ in stages]


def trial(index: int, value: float, *, name: str = "", stage: int = 0) -> Trial:
    return Trial(index, stage, (float(index), 0.0), value, True, name)


def test_the_best_pass_and_base_and_mean_besides() -> None:
    trials = [
        trial(0, 9.0, name=BASE_NAME), trial(1, 2.5, name=MEAN_NAME), trial(2, 3.0),
        trial(3, math.inf), trial(4, 1.0), trial(5, 2.0, name=SOUP_NAME), trial(6, 4.0),
    ]  # fmt: skip
    assert [t.index for t in shortlist(trials, 2)] == [4, 5, 1, 0]
    assert [t.index for t in shortlist(trials, 99)] == [4, 5, 1, 2, 6, 0]
    equal = [Trial(i, 0, p, 1.0) for i, p in enumerate([(1.0, 1.0), (0.0, 0.5), (0.5, 0.0)])]
    assert [t.index for t in shortlist(equal, 2)] == [1, 2], "the shorter, then the earlier"


def test_the_rank_correlation_is_that_of_ranks() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 6, 20) / 3, draw.normal(size=20)
    lower = [trial(i, float(v)) for i, v in enumerate(a)]
    upper = [trial(i, math.inf if i == 4 else float(b[i]), stage=1) for i in draw.permutation(20)]
    shared = [i for i in range(20) if i != 4]
    expected = np.corrcoef(rankdata(a[shared]), rankdata(b[shared]))[0, 1]
    assert rank_correlation(lower, upper) == (pytest.approx(expected), 19)
    assert rank_correlation(lower, upper[:2])[0] is None
    assert rank_correlation(lower, [trial(i, 1.0, stage=1) for i in range(5)])[0] is None


def staged(stage: int, point: Point) -> float:
    """Each stage measures from another place, and on another scale."""
    target = ((0.9, 0.9), (0.6, 0.9), (0.6, 0.6))[stage]
    return 1000.0**stage * (math.dist(point, target) - 0.5)


def climbing() -> Search:
    """25 points in three stages."""
    return search_of("grid", space_of(2), grid=((0.0, 0.3, 0.6, 0.9, 1.2),) * 2, stages=STAGES)


def climb(objectives: Callable[[int, Point], float] = staged) -> tuple[Search, list[Trial]]:
    search, asked = climbing(), list[Trial]()
    while (step := search.next(asked)) is not None:
        asked.append(done(len(asked), step, lambda point, at=step[0]: objectives(at, point)))
    return search, asked


def test_each_stage_judges_what_the_one_before_kept_and_the_references() -> None:
    search, asked = climb()
    stages = [points_of(asked, stage) for stage in range(3)]
    references = {search.base, search.mean}

    def best(points: list[Point], stage: int, keep: int) -> set[Point]:
        own = [point for point in points if point not in references]
        return set(sorted(own, key=lambda p: (staged(stage, p), math.hypot(*p)))[:keep])

    assert set(stages[1]) == best(stages[0], 0, 6) | references
    assert set(stages[2]) == best(stages[1], 1, 3) | references, "by its own values"
    assert best(stages[1], 1, 3) != best(stages[1], 0, 3), "else this would prove nothing"
    assert search.expected == 2 + 24 + 8 + 5 == len(asked)
    for stage in (0, 1):
        below = [one for one in asked if one.stage <= stage]
        assert climbing().next(below)[0] == stage + 1
        running = [replace(one, is_done=False) if one is below[-3] else one for one in below]
        assert climbing().next(running) == "wait", "another worker may still find the best"
    last = [*asked[:-1], replace(asked[-1], is_done=False)]
    assert climbing().next(last) == "wait", "if that worker dies, somebody must take over"


def test_the_last_stage_decides_and_the_record_tells_of_all() -> None:
    search, asked = climb()
    best, record, notes = conclude(search, asked, METRICS)
    assert best.point == min(points_of(asked, 2), key=lambda point: staged(2, point))
    rhos = [
        rank_correlation(*([t for t in asked if t.stage == s] for s in (stage, stage + 1)))[0]
        for stage in (0, 1)
    ]
    assert record == {
        "objective": "fid", "evaluations": 39, "best": best.value, "seconds": 39,
        "values": {"base": staged(2, search.base), "mean": staged(2, search.mean),
                   "best": best.value},
        "rungs": [
            {"objective": "loss", "num": 64, "evaluations": 26, "keep": 6, "rho_to_next": rhos[0]},
            {"objective": "kid", "num": 1000, "evaluations": 8, "keep": 3, "rho_to_next": rhos[1]},
            {"objective": "fid", "num": 5000, "evaluations": 5, "keep": 1, "rho_to_next": None},
        ],
    }  # fmt: skip
    assert notes == [] or "rank the candidates differently" in notes[0]
    _, asked = climb(lambda stage, point: math.dist(point, (0.5, 0.5)))
    assert conclude(search, asked, METRICS)[0].name == MEAN_NAME, "it may win"
    search, asked = climb(lambda stage, point: (-1) ** stage * math.dist(point, (0.3, 0.3)))
    notes = conclude(search, asked, METRICS)[2]
    assert "loss and kid rank the candidates differently (Spearman's rho -1.00 over 8)" in notes[0]


def test_what_is_broken_in_a_stage_goes_no_further() -> None:
    def objectives(stage: int, point: Point) -> float:
        is_bad = (point[0] == 0.9, point == (0.6, 0.6), sum(point) == 0)[stage]
        return math.nan if is_bad else staged(stage, point)

    search, asked = climb(objectives)
    second, third = points_of(asked, 1), points_of(asked, 2)
    assert (0.6, 0.6) in second
    assert not any(point[0] == 0.9 for point in second)
    assert (0.6, 0.6) not in third
    best, record, notes = conclude(search, asked, METRICS)
    assert f"{5 + 1 + 1} of {len(asked)} trials had no finite objective" in notes[0]
    assert record["values"]["base"] is None, "not finite, so not in the record"
    assert math.isfinite(best.value)
    with pytest.raises(NumericsError, match="not finite for any candidate"):
        climb(lambda stage, point: math.nan)
