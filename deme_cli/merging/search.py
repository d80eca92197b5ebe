"""What a search tries next (grid, random, cmaes, tpe, gradient), and the procedure around it.

Everything is a function of the trials so far and a seed: every step looks at the journal, decides
under its lock what is next, evaluates it, and notes the result; so it does not matter how often the
procedure was stopped, or how many processes run it. Stage 0 holds the references (the base, 1/N
each), what the sampler proposes, and the greedy soup; each further stage the best of the one before
(successive halving): `loss:64,kid@1k:16,fid@5k` reads: by held-out loss keep 64, by the kernel
distance of 1,000 images keep 16 of them, and let the Fréchet distance of 5,000 images decide. A
sampler gives a point, WAIT where the next one depends on trials that others
are still evaluating, or None at its end. The algorithms are those of `cmaes`, optuna and scipy;
optuna's own CMA-ES keeps its state as a pickle in the journal, which nobody here opens. Nothing is
printed.
N experts, D searched numbers.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from deme_cli.errors import ConfigError
from deme_cli.merging.coefficients import Grid, Point, Space, grid_points
from deme_cli.merging.journal import Journal, Trial, ranked

BASE_NAME, MEAN_NAME, SOUP_NAME = "base", "1/N each", "soup candidate"
WAIT: Literal["wait"] = "wait"
Step = Point | Literal["wait"] | None
Propose = Callable[[Sequence[Trial]], Step]
Evaluate = Callable[[int, Point, str], tuple[float, Sequence[float] | None]]  # objective, slopes

PER_NUMBER = {"random": 25, "cmaes": 30, "tpe": 30}  # evaluations for each searched number
MOST, DESCENT_STEPS = 1000, 20
FIRST_SIGMA = 0.25  # initial deviation as a share of the box (Hansen 2016, section B.1: 0.2-0.5)
WIDE = 50  # dimensions from which hardly any draw lies within the box, and few are drawn again
FIRST_RANDOM = 10  # trials before the model of tpe is trusted, the sampler's default
FIRST_STEP = 0.3  # how far the first step of a descent goes
POLL_SECONDS = 0.2
OBJECTIVES = ("loss", "experts", "kid", "fid")
KEPT = 10  # candidates that the last stage keeps if nobody says otherwise: recorded, no more
WEAK_RHO, ENOUGH = 0.5, 8  # a correlation that is weak; candidates from which it says something
_STAGE = re.compile(r"(?P<name>[a-z]+)(?:@(?P<num>\d+(?:\.\d+)?)(?P<kilo>k?))?(?::(?P<keep>\d+))?")


@dataclass(frozen=True)
class Stage:
    """One objective: its name, draws or images per candidate, and how many candidates it keeps."""

    name: str
    num: int
    keep: int

    @property
    def is_distance(self) -> bool:
        return self.name in ("kid", "fid")


def parse_stages(text: str, *, num: int) -> list[Stage]:
    """The stages of `--objective`; `num` where one names no number of its own.

    Raises ConfigError where the text does not parse, a stage that is not the last keeps no number,
    or one keeps more than the one before.
    """
    stages: list[Stage] = []
    parts = [part.strip() for part in text.split(",")]
    for place, part in enumerate(parts, start=1):
        match = _STAGE.fullmatch(part)
        if not match or match["name"] not in OBJECTIVES:
            raise ConfigError(
                f"objective {part!r}: expected {', '.join(OBJECTIVES)}, or several in turn, as "
                f"loss:64,kid@1k:16,fid@5k"
            )
        if match["keep"] is None and place < len(parts):
            raise ConfigError(
                f"objective {part!r}: how many does it keep for the next? as {part}:16"
            )
        keep = int(match["keep"] or KEPT)
        if keep < 1 or (match["keep"] and stages and keep > stages[-1].keep):
            least = f"at most the {stages[-1].keep} it is given" if stages else "at least 1"
            raise ConfigError(f"objective {part!r} keeps {keep}; expected {least}")
        own = float(match["num"] or num) * (1000 if match["kilo"] else 1)
        if not 1 <= own < 1e15 or own != int(own):
            raise ConfigError(f"objective {part!r}: {own:g} is no number of draws or images")
        stages.append(Stage(match["name"], int(own), keep))
    return stages


def first_free(points: Sequence[Point], trials: Sequence[Trial]) -> Step:
    """The first of `points` that nobody has begun."""
    begun = {trial.point for trial in trials}
    return next((point for point in points if point not in begun), None)


def first_needed(points: Sequence[Point], trials: Sequence[Trial]) -> Step:
    """The same, then WAIT until all of them are evaluated."""
    step = first_free(points, trials)
    is_running = any(trial.point in points for trial in trials if not trial.is_done)
    return WAIT if step is None and is_running else step


def random_points(space: Space, num: int, seed: int) -> list[Point]:
    """The start, then points drawn uniformly within the bounds (Bergstra & Bengio 2012)."""
    low, high = np.array(space.box).T
    drawn = np.random.default_rng(seed).uniform(low, high, (max(num - 1, 0), len(low)))
    return [space.everywhere(space.start), *(tuple(map(float, point)) for point in drawn)]


class Evolution:
    """CMA-ES (Hansen 2016, arXiv:1604.00772), by the package `cmaes`: whole generations.

    The box is scaled to the unit cube. A candidate that is broken counts as the worst of its
    generation. The generations so far are drawn again from the seed, and kept from then on.
    """

    def __init__(self, space: Space, seed: int) -> None:
        from cmaes import CMA

        self._low, high = np.array(space.box).T
        self._width = high - self._low
        start, count = np.array(space.everywhere(space.start)), len(space.box)
        self._strategy = CMA(
            mean=(start - self._low) / self._width, sigma=FIRST_SIGMA, seed=seed % 2**32,
            bounds=np.tile([0.0, 1.0], (count, 1)), n_max_resampling=5 if count > WIDE else 100,
        )  # fmt: skip
        self._draw()

    def _draw(self) -> None:
        self._drawn = [self._strategy.ask() for _ in range(self._strategy.population_size)]
        self._points = [tuple(map(float, self._low + x * self._width)) for x in self._drawn]

    def propose(self, trials: Sequence[Trial]) -> Step:
        known = {trial.point: trial.value for trial in trials}
        while not self._strategy.should_stop():
            if (step := first_needed(self._points, trials)) is not None:
                return step
            values = [known[point] for point in self._points]
            worst = max((v for v in values if math.isfinite(v)), default=0.0)
            finite = [v if math.isfinite(v) else worst + abs(worst) + 1 for v in values]
            self._strategy.tell(list(zip(self._drawn, finite, strict=True)))
            self._draw()
        return None


def parzen(space: Space, seed: int, trials: Sequence[Trial]) -> Point:
    """Tree-structured Parzen estimators of optuna (Bergstra et al. 2011; Falkner et al. 2018).

    The model is fitted afresh to all trials; points that others are evaluating count as bad ones
    meanwhile, and a broken candidate as the worst of the others, so that both are avoided.
    """
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.trial import TrialState, create_trial

    start = space.everywhere(space.start)
    if all(trial.point != start for trial in trials):
        return start
    kinds: dict[str, BaseDistribution] = {
        label: FloatDistribution(*pair) for label, pair in zip(space.labels, space.box, strict=True)
    }
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate: "experimental"
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=FIRST_RANDOM, multivariate=True, constant_liar=True,
            seed=(seed + 7919 * (1 + max(trial.index for trial in trials))) % 2**32,
        )  # fmt: skip
    study = optuna.create_study(sampler=sampler)
    worst = max((trial.value for trial in trials if math.isfinite(trial.value)), default=0.0)
    for trial in trials:
        if space.holds(trial.point):
            study.add_trial(create_trial(
                state=TrialState.COMPLETE if trial.is_done else TrialState.RUNNING,
                value=min(trial.value, worst) if trial.is_done else None,
                params=dict(zip(kinds, trial.point, strict=True)), distributions=kinds,
            ))  # fmt: skip
    found = study.ask(kinds).params
    return tuple(float(found[name]) for name in kinds)


class _Answer(Exception):
    """Ends the optimiser's run where it wants a point that has no value; holds the step instead."""


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
        if not math.isfinite(trial.value):
            raise _Answer(None if trial.is_done else WAIT)
        return trial.value, np.array(trial.slopes)

    try:
        start = np.array(space.everywhere(space.start))
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
        return answer.args[0]
    return None


def greedy_soup(space: Space, trials: Sequence[Trial]) -> tuple[Step, Point | None]:
    """The next point that the soup needs, and the soup once it needs none.

    Wortsman et al. 2022, recipe 1, with task vectors for ingredients: experts are tried alone and
    sorted; each joins the mean of those already chosen if that does not raise the objective.
    """
    values = {trial.point: trial.value for trial in trials}
    count = len(space.experts)

    def mean_of(chosen: Sequence[int]) -> Point:
        return space.everywhere([(i in chosen) / len(chosen) for i in range(count)])

    alone = [mean_of([i]) for i in range(count)]
    if (step := first_needed(alone, trials)) is not None:
        return step, None
    order = sorted(range(count), key=lambda i: (values[alone[i]], i))
    chosen = order[:1]
    for expert in order[1:]:
        point = mean_of([*chosen, expert])
        if (step := first_needed([point], trials)) is not None:
            return step, None
        if math.isfinite(values[point]) and values[point] <= values[mean_of(chosen)]:
            chosen = [*chosen, expert]
    return None, mean_of(chosen)


@dataclass(frozen=True)
class Search:
    """What is searched. `evaluations` and `seconds` (of all trials together) limit the sampler, not
    the stages above it; `with_soup` adds the greedy soup to the candidates."""

    method: str
    space: Space
    propose: Propose
    stages: Sequence[Stage]
    evaluations: int
    seconds: float = math.inf
    with_soup: bool = False

    @property
    def expected(self) -> int:
        """How many trials it will take, about."""
        soup = 2 * len(self.space.experts) - 1 if self.with_soup else 0
        return 2 + self.evaluations + soup + sum(stage.keep + 2 for stage in self.stages[:-1])

    def next(self, trials: Sequence[Trial]) -> tuple[int, Point, str] | Literal["wait"] | None:
        """Stage, point and name of the next trial; WAIT for others; None at the end."""
        by_stage = [[t for t in trials if t.stage == stage] for stage in range(len(self.stages))]
        point, name = self._next_of_first(by_stage[0])
        if point is not None:
            return (0, point, name) if isinstance(point, tuple) else WAIT
        for stage, own in enumerate(by_stage[1:], start=1):
            if not all(trial.is_done for trial in by_stage[stage - 1]):
                return WAIT
            begun = {trial.point for trial in own}
            for trial in shortlist(by_stage[stage - 1], self.stages[stage - 1].keep):
                if trial.point not in begun:
                    return stage, trial.point, trial.name
        return None if all(trial.is_done for trial in trials) else WAIT

    def _next_of_first(self, trials: Sequence[Trial]) -> tuple[Step, str]:
        for point, name in ((self.space.base, BASE_NAME), (self.space.mean, MEAN_NAME)):
            if all(trial.point != point for trial in trials):
                return point, name
        sampled = [trial for trial in trials if trial.name != SOUP_NAME]  # it teaches nothing
        is_over = sum(not trial.name for trial in trials) >= self.evaluations or (
            sum(trial.seconds for trial in trials) >= self.seconds
        )
        if not is_over and (step := self.propose(sampled)) is not None:
            return step, ""
        return (greedy_soup(self.space, trials)[0] if self.with_soup else None), SOUP_NAME

    def soup(self, trials: Sequence[Trial]) -> Point | None:
        """The greedy soup, where the search has tried it."""
        own = [trial for trial in trials if trial.stage == 0]
        return greedy_soup(self.space, own)[1] if self.with_soup else None

    def run(self, journal: Journal, evaluate: Evaluate, check: Callable[[], None]) -> Iterator[int]:
        """Evaluate what is left; yields the id of each trial once it is on disk.

        `check` is called while there is nothing to do but wait, and raises to stop.
        """
        while True:
            check()
            with journal.asking() as trials:
                step = self.next(trials)
                trial = journal.start(*step) if isinstance(step, tuple) else -1
            if step is None:
                return
            if not isinstance(step, tuple):
                time.sleep(POLL_SECONDS)
                continue
            try:
                value, slopes = evaluate(*step)
            except BaseException:
                journal.finish(trial, None)
                raise
            journal.finish(trial, value, slopes)
            yield trial


def open_search(
    method: str, space: Space, stages: Sequence[Stage], *, grid: Grid | None, seed: int,
    evaluations: int | None, seconds: float = math.inf, with_soup: bool = False,
) -> Search:  # fmt: skip
    """The search that `--search` names.

    Raises ConfigError where nothing is left to search for, or too much.
    """
    if not space.box:
        raise ConfigError(
            "--coefficients-for sets every tensor, which leaves nothing to search for; leave out "
            "--search, or narrow the globs"
        )
    propose: Propose
    if grid is not None:
        points = grid_points(grid, len(space.all_groups))
        points = [point for point in points if point not in (space.base, space.mean)]
        return Search(
            method, space, partial(first_free, points), stages, evaluations or len(points), seconds,
            with_soup,
        )  # fmt: skip
    usual = DESCENT_STEPS * (2 if space.groups else 1) if method == "gradient" else (
        min(PER_NUMBER[method] * len(space.box), MOST)
    )  # fmt: skip
    num = evaluations or usual
    if method == "random":
        propose = partial(first_free, random_points(space, num, seed))
    elif method == "cmaes":
        propose = Evolution(space, seed).propose
    elif method == "tpe":
        propose = partial(parzen, space, seed)
    else:
        propose = partial(descend, space, num)
    return Search(method, space, propose, stages, num, seconds, with_soup)


def shortlist(trials: Sequence[Trial], keep: int) -> list[Trial]:
    """The best `keep` of a stage that are finite, from the best on; base and mean always pass."""
    finite = [trial for trial in ranked(trials) if math.isfinite(trial.value)]
    references = [trial for trial in finite if trial.name in (BASE_NAME, MEAN_NAME)]
    kept = [trial for trial in finite if trial not in references][:keep]
    return [trial for trial in finite if trial in kept or trial in references]


def conclude(
    search: Search, trials: Sequence[Trial], metrics: Sequence[str]
) -> tuple[Trial, dict[str, Any], list[str]]:
    """The best trial of the last stage, the search as the merged file tells of it, and what a
    person should be warned of.   metrics: what each stage has measured.

    Raises NumericsError where the last stage found nothing finite.
    """
    done = [trial for trial in trials if trial.is_done]
    by_stage = [[t for t in done if t.stage == stage] for stage in range(len(search.stages))]
    best = ranked(by_stage[-1])[0]
    notes, stages = _warnings(search, done, best), list[dict[str, Any]]()
    for index, (stage, metric, own) in enumerate(
        zip(search.stages, metrics, by_stage, strict=True)
    ):
        is_last = index + 1 == len(by_stage)
        rho, shared = (None, 0) if is_last else rank_correlation(own, by_stage[index + 1])
        if rho is not None and rho < WEAK_RHO and shared >= ENOUGH:
            notes.append(
                f"{metric} and {metrics[index + 1]} rank the candidates differently (Spearman's "
                f"rho {rho:.2f} over {shared}): the first may have dropped what the second would "
                f"have chosen; keep more of them"
            )
        stages.append({
            "objective": metric, "num": stage.num, "evaluations": len(own), "keep": stage.keep,
            "rho_to_next": rho,
        })  # fmt: skip
    named = {trial.name: trial.value for trial in by_stage[-1] if math.isfinite(trial.value)}
    record = {
        "objective": metrics[-1],
        "evaluations": len(done),
        "seconds": round(sum(trial.seconds for trial in done), 3),
        "best": best.value,
        "values": {"base": named.get(BASE_NAME), "mean": named.get(MEAN_NAME), "best": best.value},
        "rungs": stages,
    }
    return best, record, notes


def _warnings(search: Search, done: Sequence[Trial], best: Trial) -> list[str]:
    """What was broken, and where nothing was found."""
    notes = []
    broken = [trial for trial in done if not math.isfinite(trial.value)]
    if search.method == "gradient" and any(t.name != SOUP_NAME and t.stage == 0 for t in broken):
        notes.append(
            "the descent ended at a point whose objective was not finite; set narrower bounds in "
            "[merge], or take --search cmaes, which passes over such points"
        )
    if broken:
        notes.append(f"{len(broken)} of {len(done)} trials had no finite objective; skipped")
    if not any(best.point) and not search.space.fixed:
        notes.append("no candidate is better than the base; the merged model is the base itself")
    return notes


def rank_correlation(lower: Sequence[Trial], upper: Sequence[Trial]) -> tuple[float | None, int]:
    """Spearman's rho of two stages over the candidates that both have judged, and how many these
    are; None for fewer than 3 or where one gives all the same."""
    from scipy.stats import spearmanr

    values = {trial.point: trial.value for trial in lower}
    pairs = [(values.get(trial.point, math.inf), trial.value) for trial in upper]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None, len(pairs)
    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)
