"""What a search tries next: grid, random, cmaes, tpe and gradient, from all trials so far.

A sampler is a function of the trials it is shown and a seed. It is asked again after every trial
and gives a point, WAIT where the next one depends on trials that others are still evaluating, or
None at its end; so a search that was stopped, or is shared by several processes, goes on. The
algorithms are those of `cmaes`, optuna and scipy. optuna's own CMA-ES keeps its covariances in the
journal, which for the coefficients of every layer is hundreds of megabytes: here the generations
are drawn again from the seed. D searched numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from deme_cli.merging.space import SLOPES, Point, Space, Trial

if TYPE_CHECKING:
    from cmaes import CMA

WAIT: Literal["wait"] = "wait"
Step = Point | Literal["wait"] | None
Propose = Callable[[Sequence[Trial]], Step]

PER_NUMBER = {"random": 25, "cmaes": 30, "tpe": 30}  # evaluations for each searched number
MOST, DESCENT_STEPS = 1000, 20
COARSE_SHARE = 1 / 3  # of a number of evaluations that was given, for one coefficient per expert
FIRST_SIGMA = 0.25  # initial deviation as a share of the box (Hansen 2016, section B.1: 0.2-0.5)
WIDE = 50  # dimensions from which hardly any draw lies within the box, and few are drawn again
FIRST_RANDOM = 10  # trials before the model of tpe is trusted, the sampler's default
FIRST_STEP = 0.3  # how far the first step of a descent goes


def usual_evaluations(search: str, space: Space) -> int:
    """How many evaluations a search takes if nobody says otherwise."""
    if search == "gradient":
        return DESCENT_STEPS
    return min(PER_NUMBER[search] * space.dimensions, MOST)


def open_sampler(search: str, space: Space, seed: int, evaluations: int) -> Propose:
    """The sampler of this name, within the bounds of `space`."""
    if search == "random":
        return partial(first_free, random_points(space, evaluations, seed))
    if search == "cmaes":
        return Evolution(space, seed).propose
    if search == "tpe":
        return partial(parzen, space, seed)
    return partial(descend, space, evaluations)


def first_free(points: Iterable[Point], trials: Sequence[Trial]) -> Step:
    """The first of `points` that nobody has begun."""
    begun = {trial.point for trial in trials}
    return next((point for point in points if point not in begun), None)


def first_needed(points: Iterable[Point], trials: Sequence[Trial]) -> Step:
    """The same, then WAIT until all of them are evaluated."""
    points = list(points)
    step = first_free(points, trials)
    is_running = {trial.point for trial in trials if not trial.is_done} & set(points)
    return WAIT if step is None and is_running else step


def random_points(space: Space, num: int, seed: int) -> list[Point]:
    """The start, then points drawn uniformly within the bounds (Bergstra & Bengio 2012)."""
    low, high = np.array(space.box).T
    drawn = np.random.default_rng(seed).uniform(low, high, (max(num - 1, 0), space.dimensions))
    return [space.start_point, *(tuple(map(float, point)) for point in drawn)]


class Evolution:
    """CMA-ES (Hansen 2016, arXiv:1604.00772), by the package `cmaes`: whole generations.

    The box is scaled to the unit cube. A candidate that is broken counts as the worst of its
    generation. What was drawn is remembered for as long as the trials agree with it.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        self._low, high = np.array(space.box).T
        self._width = high - self._low
        self._restart()

    def _restart(self) -> None:
        from cmaes import CMA

        count = self.space.dimensions
        self._told: dict[Point, float] = {}
        self._strategy = CMA(
            mean=(np.array(self.space.start_point) - self._low) / self._width, sigma=FIRST_SIGMA,
            bounds=np.tile([0.0, 1.0], (count, 1)), seed=self.seed % 2**32,
            n_max_resampling=5 if count > WIDE else 100,
        )  # fmt: skip
        self._drawn = _generation(self._strategy)

    def propose(self, trials: Sequence[Trial]) -> Step:
        known = {trial.point: trial.value for trial in trials if trial.is_done}
        if any(known.get(point) != value for point, value in self._told.items()):
            self._restart()
        while not self._strategy.should_stop():
            points = [tuple(map(float, self._low + x * self._width)) for x in self._drawn]
            if (step := first_needed(points, trials)) is not None:
                return step
            values = [known[point] for point in points]
            worst = max((v for v in values if math.isfinite(v)), default=0.0)
            finite = [v if math.isfinite(v) else worst + abs(worst) + 1 for v in values]
            self._strategy.tell(list(zip(self._drawn, finite, strict=True)))
            self._told.update(zip(points, values, strict=True))
            self._drawn = _generation(self._strategy)
        return None


def _generation(strategy: CMA) -> list[np.ndarray]:
    return [strategy.ask() for _ in range(strategy.population_size)]


def parzen(space: Space, seed: int, trials: Sequence[Trial]) -> Point:
    """Tree-structured Parzen estimators of optuna (Bergstra et al. 2011; Falkner et al. 2018).

    The model is fitted afresh to all trials; points that others are evaluating count as bad ones
    meanwhile, and a broken candidate as the worst of the others, so that both are avoided. No point
    is tried twice: in place of one that is known a random one is.
    """
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.trial import TrialState, create_trial

    known = {trial.point for trial in trials}
    if space.start_point not in known:
        return space.start_point
    kinds: dict[str, BaseDistribution] = {
        f"w{i}": FloatDistribution(low, high) for i, (low, high) in enumerate(space.box)
    }
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate: "experimental"
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=FIRST_RANDOM, multivariate=True, constant_liar=True,
            seed=(seed + 7919 * len(trials)) % 2**32,
        )  # fmt: skip
    study = optuna.create_study(sampler=sampler)
    worst = max((t.value for t in trials if math.isfinite(t.value)), default=None)
    for trial in trials:
        if not space.holds(trial.point) or (trial.is_done and worst is None):
            continue
        value = min(trial.value, worst) if trial.is_done and worst is not None else None
        study.add_trial(
            create_trial(
                state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
                value=value,
                params=dict(zip(kinds, trial.point, strict=True)),
                distributions=kinds,
            )
        )
    found = study.ask(kinds).params
    point = tuple(float(found[name]) for name in kinds)
    if point in known:
        low, high = np.array(space.box).T
        drawn = np.random.default_rng([seed, len(trials)]).uniform(low, high)
        point = tuple(map(float, drawn))
    return point


class _Answer(Exception):
    """Ends the optimiser's run where it wants a point that has no value: what to do instead."""

    def __init__(self, step: Step) -> None:
        self.step = step


def descend(space: Space, evaluations: int, trials: Sequence[Trial]) -> Step:
    """L-BFGS-B (Byrd et al. 1995) by scipy along dL/dw_i = <grad_theta L(theta(w)), tau_i>.

    One backward pass and N inner products give the whole gradient, so a step costs about three
    forwards however many coefficients there are. The optimiser is run again from its start over the
    trials that are known, and asks for the first point that is not. It ends at a broken point.
    """
    from scipy.optimize import minimize

    from deme_cli.evaluation.frechet import fitting_threads

    known = {trial.point: trial for trial in trials}

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = tuple(map(float, x))
        trial = known.get(point)
        if trial is None:
            raise _Answer(point)
        if not trial.is_done:
            raise _Answer(WAIT)
        if not math.isfinite(trial.value):
            raise _Answer(None)
        return trial.value, np.array(trial.extra[SLOPES])

    try:
        start = np.array(space.start_point)
        first, slope = evaluate(start)
        if not slope.any():
            return None
        scale = FIRST_STEP / float(np.linalg.norm(slope))  # so that the first step fits

        def scaled(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = evaluate(x)
            return (value - first) * scale, slope * scale

        with fitting_threads(len(start)):
            minimize(
                scaled, start, jac=True, method="L-BFGS-B", bounds=space.box,
                options={"maxfun": evaluations, "ftol": 1e-5, "gtol": 1e-5},
            )  # fmt: skip
    except _Answer as answer:
        return answer.step
    return None


class CoarseToFine:
    """One coefficient per expert first, then one per group, starting from the best of these.

    So what is found for blocks or layers is never worse, on the objective that was searched, than
    what the first stage found for whole networks; a number of evaluations that was given is shared
    between the two.
    """

    def __init__(self, search: str, space: Space, seed: int, evaluations: int | None) -> None:
        self.search, self.space, self.seed = search, space, seed
        whole = replace(space, groups=(), has_rest=True, shares=(1.0,))
        part = max(round(evaluations * COARSE_SHARE), 1) if evaluations else None
        self._num_coarse = part or usual_evaluations(search, whole)
        self._num_fine = max(evaluations - self._num_coarse, 1) if evaluations else (
            usual_evaluations(search, space)
        )  # fmt: skip
        self.evaluations = self._num_coarse + self._num_fine
        self._coarse = open_sampler(search, whole, seed, self._num_coarse)
        self._fine: dict[Point, Propose] = {}  # the last one, by its start

    def propose(self, trials: Sequence[Trial]) -> Step:
        uniform = self._uniform(trials)
        if sum(not trial.name for trial in uniform) < self._num_coarse:
            step = self._coarse(uniform)
            if step is not None:
                return step if step == WAIT else self.space.everywhere(step)
        elif any(not trial.is_done for trial in uniform):
            return WAIT
        start = self._best(uniform)
        if start not in self._fine:
            space = replace(self.space, start=start)
            self._fine = {start: open_sampler(self.search, space, self.seed, self._num_fine)}
        return self._fine[start](trials)

    def _uniform(self, trials: Sequence[Trial]) -> list[Trial]:
        """Trials with the same coefficients everywhere, as trials of one coefficient per expert:
        its slope is the sum of the groups'."""
        count, found = self.space.num_experts, []
        for trial in trials:
            if trial.point == self.space.everywhere(trial.point[:count]):
                extra = dict(trial.extra)
                if SLOPES in extra:
                    by_group = np.array(extra[SLOPES]).reshape(-1, count)
                    extra[SLOPES] = by_group.sum(axis=0).tolist()
                found.append(replace(trial, point=trial.point[:count], extra=extra))
        return found

    def _best(self, uniform: Sequence[Trial]) -> Point:
        """Of the references and the first trials, which were the coarse ones."""
        unnamed = sorted((t for t in uniform if not t.name), key=lambda t: t.index)
        coarse = [t for t in uniform if t.name] + unnamed[: self._num_coarse]
        whole = replace(self.space, groups=(), has_rest=True)
        inside = [t for t in coarse if math.isfinite(t.value) and whole.holds(t.point)]
        return min(inside, key=lambda t: (t.value, t.index)).point if inside else self.space.start


def greedy_soup(space: Space, trials: Sequence[Trial]) -> tuple[Step, Point | None]:
    """The next point that the soup needs, and the soup once it needs none.

    Wortsman et al. 2022, recipe 1, with task vectors for ingredients: experts are tried alone and
    sorted; each joins the mean of those already chosen if that does not raise the objective.
    """
    values = {trial.point: trial.value for trial in trials}

    def mean_of(chosen: Sequence[int]) -> Point:
        share = [1 / len(chosen) if i in chosen else 0.0 for i in range(space.num_experts)]
        return space.everywhere(share)

    alone = [mean_of([i]) for i in range(space.num_experts)]
    if (step := first_needed(alone, trials)) is not None:
        return step, None
    order = sorted(range(len(alone)), key=lambda i: (values[alone[i]], i))
    chosen = order[:1]
    for expert in order[1:]:
        point = mean_of([*chosen, expert])
        if (step := first_needed([point], trials)) is not None:
            return step, None
        if math.isfinite(values[point]) and values[point] <= values[mean_of(chosen)]:
            chosen = [*chosen, expert]
    return None, mean_of(chosen)
