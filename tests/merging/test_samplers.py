"""Plans on objectives whose least point is known: how near they come, and that nothing stops them.

A plan is driven here as `Search.run` drives it: with a journal, or (fast) with a list in its place.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize

from deme_cli.merging.journal import Journal
from deme_cli.merging.samplers import (
    FIRST_STEP,
    WAIT,
    Evolution,
    greedy_soup,
    parzen,
    random_points,
)
from deme_cli.merging.search import Search, conclude, open_search
from deme_cli.merging.space import MEAN_NAME, SOUP_NAME, Point, Space, Trial, resolve_grid
from deme_cli.merging.successive_halving import Stage

Function = Callable[[Point], float]
LOSS = [Stage("loss", 16, 1)]
TARGET = (0.9, 0.3)
SHAPE = ((1.0, 0.6), (0.6, 0.8))
SEED = 3


def space_of(count: int, **fields: object) -> Space:
    names = tuple(f"{i}of{count}" for i in range(1, count + 1))
    space = Space(names, ((-0.5, 1.5),) * count, (1 / count,) * count)
    return replace(space, **fields)


def bowl(point: Point) -> float:
    """1 + x.A.x around TARGET, as a loss near its least value."""
    x = np.array(point) - TARGET
    return float(1 + x @ np.array(SHAPE) @ x)


def bent(point: Point) -> float:
    """The bowl with terms of third and fourth order."""
    x = np.array(point) - TARGET
    return float(bowl(point) + 0.2 * (x**3).sum() + 0.1 * (x**4).sum())


def broken(point: Point) -> float:
    """The bent bowl, not a number for large coefficients near its least point, and for small."""
    return math.nan if point[0] > 1 or point[1] < -0.2 else bent(point)


def slopes(point: Point) -> list[float]:
    x = np.array(point) - TARGET
    return list(2 * np.array(SHAPE) @ x + 0.6 * x**2 + 0.4 * x**3)


SEARCHES = ("grid", "random", "cmaes", "tpe", "gradient")


def search_of(name: str, space: Space, evaluations: int | None = None, **fields: object) -> Search:
    grid = resolve_grid(None, space.num_experts) if name == "grid" else None
    return open_search(name, space, LOSS, grid=grid, seed=SEED, evaluations=evaluations, **fields)


def done(number: int, step: tuple[int, Point, str], function: Function) -> Trial:
    """A trial as the journal has it once it is finished."""
    stage, point, name = step
    value = function(point)
    value = value if math.isfinite(value) else math.inf
    extra = {"slopes": slopes(point)} if len(point) == 2 else {}
    return Trial(number, stage, point, value, name, number, number + 1, extra)


def drive(search: Search, function: Function) -> list[Trial]:
    """All trials of one worker that nobody interrupts."""
    asked: list[Trial] = []
    while (step := search.next(asked)) is not None:
        assert step != WAIT, "alone there is nobody to wait for"
        asked.append(done(len(asked), step, function))
        assert len(asked) < 500
    return asked


def points_of(asked: Sequence[Trial]) -> list[Point]:
    return [one.point for one in asked]


def excess(asked: Sequence[Trial], function: Function) -> float:
    """How far the best is above the least value, as a share of how far 1/N each is."""
    best = min(one.value for one in asked)
    return (best - 1) / (function((0.5, 0.5)) - 1)


@pytest.mark.parametrize("function", [bowl, bent, broken], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("grid", 0.5),  # (1, 0.5), the grid's own best, is not better
        ("random", 0.12), ("cmaes", 0.02), ("tpe", 0.03), ("gradient", 1e-6),
    ],
)  # fmt: skip
def test_a_plan_comes_near_the_least_value_within_its_usual_budget(
    name: str, share: float, function: Function
) -> None:
    space = space_of(2)
    search = search_of(name, space)
    asked = drive(search, function)
    assert excess(asked, function) < share
    assert len(asked) <= search.expected
    inside = [one.point for one in asked if not one.name]
    for point in inside:
        assert all(low <= w <= high for w, (low, high) in zip(point, space.box, strict=True))
    assert len(set(points_of(asked))) == len(asked), "no point is tried twice"


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_broken_candidates_are_avoided_and_not_only_skipped(name: str) -> None:
    asked = drive(search_of(name, space_of(2), 40), broken)
    assert excess(asked, broken) < 0.15
    late = [one.value for one in asked[len(asked) // 2 :]]
    assert sum(not math.isfinite(value) for value in late) < len(late) / 2


@pytest.mark.parametrize("name", ["random", "tpe", "gradient"])
def test_the_start_comes_first(name: str) -> None:
    asked = drive(search_of(name, space_of(2, start=(0.25, -0.25)), 3), bowl)
    assert asked[2].point == (0.25, -0.25)


def test_evolution_draws_its_first_generation_around_the_start() -> None:
    space = space_of(2, start=(1.25, -0.25), bounds=((-50, 50), (-50, 50)))
    plan, asked = Evolution(space, SEED), []
    for number in range(6):
        step = (0, plan.propose(asked), "")
        asked.append(done(number, step, lambda point: float(len(asked))))
    assert np.linalg.norm(np.mean(points_of(asked), axis=0) - (1.25, -0.25)) < 25


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_of_one_expert_runs(name: str) -> None:
    def parabola(point: Point) -> float:
        return (point[0] - 0.8) ** 2

    def run() -> list[Trial]:
        search = search_of(name, space_of(1), None)
        asked: list[Trial] = []
        while (step := search.next(asked)) is not None:
            one = done(len(asked), step, parabola)
            asked.append(replace(one, extra={"slopes": [2 * (one.point[0] - 0.8)]}))
        return asked

    asked = run()
    assert [one.name for one in asked[:2]] == ["base", MEAN_NAME]
    assert run() == asked, "the same from the same seed"
    if name != "grid":
        assert min(one.value for one in asked) < 0.01


@pytest.mark.parametrize("name", ["random", "cmaes", "tpe"])
def test_groups_are_searched_on_their_own(name: str) -> None:
    """Two experts, three groups, six numbers; what is fixed is no number."""
    space = space_of(
        2, groups=("down_blocks.0.*", "mid_block.*"), shares=(0.5, 0.25, 0.25),
        fixed={"conv_out.*": (1.0, 0.0)},
    )  # fmt: skip

    def apart(point: Point) -> float:
        by_group = space.by_group(point)
        return math.fsum(
            math.dist(w, (0.2 * place, 1 - 0.3 * place)) ** 2
            for place, w in enumerate(by_group.values())
        )

    asked = drive(search_of(name, space, 60), apart)
    assert {len(one.point) for one in asked} == {6}
    assert points_of(asked)[:2] == [(0.0,) * 6, (0.5,) * 6]
    shared = [len(set(space.by_group(one.point).values())) == 1 for one in asked]
    assert not all(shared[2:])
    best = min(asked, key=lambda one: one.value)
    found = space.coefficients(best.point)
    assert found.of("conv_out.weight") == (1.0, 0.0)
    assert found.of("mid_block.x.weight") == best.point[2:4]
    assert found.of("conv_in.weight") == best.point[4:6]


def work(path: Path, search: Search, function: Function, stop: int | None = None) -> list[Point]:
    """What a process evaluates that runs to the end, or is interrupted in trial `stop`."""
    tried: list[Point] = []

    def evaluate(stage: int, point: Point, name: str) -> tuple[float, dict]:
        if len(tried) == stop:
            raise KeyboardInterrupt
        tried.append(point)
        return function(point), {"slopes": slopes(point)}

    journal = Journal(path, search.space.labels, {})
    journal.open(force=False)
    for _ in search.run(journal, evaluate, lambda: None):
        pass
    return tried


def vanish(path: Path, search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that begins a trial and is gone."""
    journal = Journal(path, search.space.labels, {})
    journal.open(force=False)
    with journal.asking() as asked, monkeypatch.context() as patch:
        patch.setattr("deme_cli.merging.journal.this_process", lambda: "somewhere:1:0")
        patch.setattr("deme_cli.merging.journal._FOREIGN_SECONDS", -1.0)
        step = search.next(asked)
        if isinstance(step, tuple):
            journal.start(*step)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_stopped_in_any_trial_goes_on_as_if_nothing_had_happened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deme_cli.merging.journal._FOREIGN_SECONDS", -1.0)
    space, path = space_of(2), tmp_path / "trials.jsonl"
    search = search_of(name, space, 13 if name == "tpe" else 9)
    whole = drive(search, broken)
    for stop in range(1, len(whole), 3):
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            work(path, search, broken, stop)
        vanish(path, search, monkeypatch)
        assert work(path, search, broken) == points_of(whole)[stop:]
        journal = Journal(path, space.labels, {})
        assert journal.open(force=False) == len(whole)
        found = journal.trials()
        keys = [(one.stage, one.point, one.value, one.name) for one in found]
        assert keys == [(one.stage, one.point, one.value, one.name) for one in whole]


def share_out(search: Search, function: Function, seed: int) -> list[Trial]:
    """Trials of three workers whose steps alternate at random; some die in the middle of one."""
    draw, asked = random.Random(seed), []
    at_work: dict[int, int | None] = {0: None, 1: None, 2: None}
    for number in itertools.count():
        worker = draw.choice(list(at_work))
        place = at_work[worker]
        if place is None:
            step = search.next(asked)
            if step is None:
                del at_work[worker]
                if not at_work:
                    return asked
            elif isinstance(step, tuple):
                at_work[worker] = number
                asked.append(Trial(number, *step[:2], None, step[2]))
            else:
                assert any(not one.is_done for one in asked), "nobody works, and all wait"
            continue
        at_work[worker] = None
        (index,) = (i for i, one in enumerate(asked) if one.index == place)
        one = asked[index]
        if draw.random() < 0.15:
            del asked[index]
        else:
            asked[index] = done(one.index, (one.stage, one.point, one.name), function)
    raise AssertionError


@pytest.mark.parametrize("name", ["grid", "random", "cmaes", "gradient"])
@pytest.mark.parametrize("function", [bent, broken], ids=lambda f: f.__name__)
def test_workers_together_try_what_one_alone_tries(name: str, function: Function) -> None:
    """But for tpe, whose next point depends on what is known when it is asked for."""
    search = search_of(name, space_of(2), None, with_soup=True)
    alone = {one.point: one.value for one in drive(search, function)}
    for seed in range(2):
        asked = share_out(search, function, seed)
        assert len(asked) == len(alone), "none twice"
        assert {one.point: one.value for one in asked} == alone


def test_workers_together_spend_the_budget_of_one() -> None:
    search = search_of("tpe", space_of(2), 12)
    for seed in range(3):
        asked = share_out(search, bent, seed)
        assert len(asked) == len(set(points_of(asked)))
        assert sum(not one.name for one in asked) == 12


@pytest.mark.parametrize("budget", [1, 3, 7])
def test_a_budget_of_evaluations_holds_besides_the_references(budget: int) -> None:
    for name in SEARCHES:
        asked = drive(search_of(name, space_of(2), budget), bent)
        assert sum(not one.name for one in asked) <= budget
        longer = drive(search_of(name, space_of(2), budget + 2), bent)
        assert longer[: len(asked)] == asked, "a raised budget goes on with the same points"


def test_a_budget_of_time_counts_each_second_once() -> None:
    search = search_of("random", space_of(2), seconds=5.5)
    asked = drive(search, bent)
    assert len(asked) == 6, "each takes a second; the sixth ends it"
    overlapping = [replace(one, began=0.5 * one.index, ended=0.5 * one.index + 1) for one in asked]
    assert search.next(overlapping) is not None, "two workers at once have spent 3.5 seconds"


def test_a_longer_list_of_random_points_begins_with_the_shorter() -> None:
    space = space_of(3)
    points = random_points(space, 40, SEED)
    assert random_points(space, 10, SEED) == points[:10]
    assert random_points(space, 1, SEED) == [space.start_point]
    assert random_points(space, 40, SEED + 1)[1:] != points[1:]


@pytest.mark.filterwarnings("ignore:PartialFixedSampler")
def test_a_model_that_proposes_a_known_point_gets_a_random_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import optuna

    space = space_of(2)
    asked = drive(search_of("tpe", space, 3), bent)
    old, study = asked[-1].point, optuna.create_study()
    fixed = optuna.samplers.PartialFixedSampler({"w0": old[0], "w1": old[1]}, study.sampler)
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda **options: fixed)
    point = parzen(space, SEED, asked)
    assert point not in points_of(asked)
    assert space.holds(point)


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


@pytest.mark.parametrize("seed", range(6))
def test_the_greedy_soup_is_that_of_the_recipe(seed: int) -> None:
    count = 2 + seed % 5
    draw = np.random.default_rng(seed)
    target, bad = draw.uniform(-0.2, 0.8, count), draw.integers(count)

    def function(point: Point) -> float:
        alone = max(point) == 1 and point[bad] == 1
        return math.nan if alone and seed % 3 == 0 else math.dist(point, target)

    space = space_of(count)
    soup, tried = recipe(function, count)
    asked = drive(search_of("random", space, 1, with_soup=True), function)
    assert greedy_soup(space, asked) == (None, soup)
    beside = {one.point for one in asked if one.name == SOUP_NAME}
    assert beside <= set(tried) <= beside | {space.base, space.mean}
    assert all(one.name in ("base", MEAN_NAME, SOUP_NAME) for one in asked if one.index != 2)


def test_an_expert_that_changes_nothing_joins_the_soup() -> None:
    """Recipe 1 adds where the objective is not raised."""
    space = space_of(3)
    asked = drive(search_of("random", space, 1, with_soup=True), lambda point: 1.0)
    assert greedy_soup(space, asked)[1] == space.mean


@pytest.mark.parametrize("name", SEARCHES)
def test_experts_with_the_same_task_vector_are_searched(name: str) -> None:
    """The objective knows the sum of the first two coefficients only."""

    def same(point: Point) -> float:
        return 1 + (point[0] + point[1] - 0.7) ** 2 + 0.1 * (point[2] - 0.4) ** 4

    def slope(point: Point) -> list[float]:
        first = 2 * (point[0] + point[1] - 0.7)
        return [first, first, 0.4 * (point[2] - 0.4) ** 3]

    space = space_of(3)
    search, asked = search_of(name, space, None), []
    while (step := search.next(asked)) is not None:
        one = done(len(asked), step, same)
        asked.append(replace(one, extra={"slopes": slope(one.point)}))
    assert min(one.value for one in asked) < same(space.mean) + 1e-12


@pytest.mark.parametrize("name", SEARCHES)
def test_where_every_candidate_is_broken_a_plan_still_comes_to_its_end(name: str) -> None:
    asked = drive(search_of(name, space_of(2), 12), lambda point: math.nan)
    assert all(one.value == math.inf for one in asked)
    assert 2 <= len(asked) <= 14


def test_descent_by_lbfgs_is_that_of_scipy() -> None:
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
    asked = drive(search_of("gradient", space), bent)
    assert points_of(asked)[1:] == list(dict.fromkeys(asked_by_scipy))


def test_a_descent_that_meets_a_broken_point_ends_and_says_so() -> None:
    def cliff(point: Point) -> float:
        return math.nan if point[0] > 0.55 else bent(point)

    search, objective = search_of("gradient", space_of(2)), SimpleNamespace(name="loss", label="l")
    asked = drive(search, cliff)
    assert asked[-1].value == math.inf
    assert "not finite; set narrower bounds" in conclude(search, asked, [objective]).warnings[0]
    assert conclude(search, drive(search, bent), [objective]).warnings == []
