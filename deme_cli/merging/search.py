"""What a search tries next (grid, random, cmaes, tpe, gradient), and the procedure around it.

A search is written as if values were there at once: a generator that yields what it wants to know,
and is sent the trials. `Search.next` runs it as far as the journal's trials carry it, and the first
that nobody has begun comes next; so everything is a function of the trials so far and a seed, and
it does not matter how often the procedure was stopped, or how many processes run it. First come the
references (the base, 1/N each), then what a sampler wants, then the greedy soup; each further stage
takes the best of the one before (successive halving): `loss:64,kid@1k:16,fid@5k` reads: by held-out
loss keep 64, by the kernel distance of 1,000 images keep 16 of them, and let the Fréchet distance
of 5,000 images decide. The algorithms are those of `cmaes`, optuna and scipy; optuna's own CMA-ES
keeps its state as a pickle in the journal, which nobody here opens. Nothing is printed.
N experts, D searched numbers.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deme_cli.errors import ConfigError
from deme_cli.merging.coefficients import Grid, Point, Space, grid_points
from deme_cli.merging.journal import Journal, Trial, ranked

BASE_NAME, MEAN_NAME, SOUP_NAME = "base", "1/N each", "soup candidate"
Wanted = tuple[int, Point, str]  # stage, point, name
Steps = Generator[list[Wanted], Sequence[Trial], Any]
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
    for part in parts:
        match = _STAGE.fullmatch(part)
        if not match or match["name"] not in OBJECTIVES:
            raise ConfigError(
                f"objective {part!r}: expected {', '.join(OBJECTIVES)}, or several in turn, as "
                f"loss:64,kid@1k:16,fid@5k"
            )
        if match["keep"] is None and len(stages) + 1 < len(parts):
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


def sample(points: Sequence[Point]) -> Steps:
    """Points that are known in advance: a grid, or random ones (Bergstra & Bengio 2012)."""
    yield [(0, point, "") for point in points]


def random_points(space: Space, num: int, seed: int) -> list[Point]:
    """The start, then points drawn uniformly within the bounds."""
    low, high = np.array(space.box).T
    drawn = np.random.default_rng(seed).uniform(low, high, (max(num - 1, 0), len(low)))
    return [space.everywhere(space.start), *(tuple(map(float, point)) for point in drawn)]


def evolve(space: Space, seed: int) -> Steps:
    """CMA-ES (Hansen 2016, arXiv:1604.00772), by the package `cmaes`: whole generations.

    The box is scaled to the unit cube. A candidate that is broken counts as the worst of its
    generation.
    """
    from cmaes import CMA

    low, high = np.array(space.box).T
    strategy = CMA(
        mean=(np.array(space.everywhere(space.start)) - low) / (high - low), sigma=FIRST_SIGMA,
        seed=seed % 2**32, bounds=np.tile([0.0, 1.0], (len(low), 1)),
        n_max_resampling=5 if len(low) > WIDE else 100,
    )  # fmt: skip
    while not strategy.should_stop():
        drawn = [strategy.ask() for _ in range(strategy.population_size)]
        points = [tuple(map(float, low + x * (high - low))) for x in drawn]
        trials = yield [(0, point, "") for point in points]
        known = {trial.point: trial.value for trial in trials if not trial.stage}
        values = [known[point] for point in points]
        worst = max((v for v in values if math.isfinite(v)), default=0.0)
        finite = [v if math.isfinite(v) else worst + abs(worst) + 1 for v in values]
        strategy.tell(list(zip(drawn, finite, strict=True)))


def estimate(space: Space, seed: int) -> Steps:
    """Tree-structured Parzen estimators of optuna (Bergstra et al. 2011; Falkner et al. 2018).

    The model is fitted afresh to all trials; points that others are evaluating count as bad ones
    meanwhile, and a broken candidate as the worst of the others, so that both are avoided.
    """
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.trial import TrialState, create_trial

    kinds: dict[str, BaseDistribution] = {
        label: FloatDistribution(*pair) for label, pair in zip(space.labels, space.box, strict=True)
    }
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials = yield [(0, space.everywhere(space.start), "")]
    while True:
        known = [trial for trial in trials if not trial.stage and trial.name != SOUP_NAME]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate: "experimental"
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=FIRST_RANDOM, multivariate=True, constant_liar=True,
                seed=(seed + 7919 * (1 + max(trial.index for trial in known))) % 2**32,
            )  # fmt: skip
        study = optuna.create_study(sampler=sampler)
        worst = max((trial.value for trial in known if math.isfinite(trial.value)), default=0.0)
        for trial in known:
            if all(low <= w <= high for w, (low, high) in zip(trial.point, space.box, strict=True)):
                study.add_trial(create_trial(
                    state=TrialState.COMPLETE if trial.is_done else TrialState.RUNNING,
                    value=min(trial.value, worst) if trial.is_done else None,
                    params=dict(zip(kinds, trial.point, strict=True)), distributions=kinds,
                ))  # fmt: skip
        found = study.ask(kinds).params
        trials = yield [(0, tuple(float(found[name]) for name in kinds), "")]


class _Unknown(Exception):
    """Ends the optimiser's run where it asks for a point that has no value; holds that point, None
    for one that is broken."""


def descend(space: Space, evaluations: int) -> Steps:
    """L-BFGS-B (Byrd et al. 1995) by scipy along dL/dw_i = <grad_theta L(theta(w)), tau_i>.

    One backward pass and N inner products give the whole gradient, so a step costs about three
    forwards however many coefficients there are. The optimiser is run again from its start over the
    trials that are known, until it asks for one that is not. It ends at a broken point.
    """
    trials: Sequence[Trial] = ()
    while (point := _descent(space, evaluations, trials)) is not None:
        trials = yield [(0, point, "")]


def _descent(space: Space, evaluations: int, trials: Sequence[Trial]) -> Point | None:
    """The next point that the optimiser asks for; None at its end."""
    from scipy.optimize import minimize

    from deme_cli.evaluation.frechet import fitting_threads

    known = {t.point: t for t in trials if t.is_done and not t.stage and t.name != SOUP_NAME}
    start = space.everywhere(space.start)
    if (first := known.get(start)) is None:
        return start
    if not any(slopes := first.slopes or ()):
        return None
    scale = FIRST_STEP / float(np.linalg.norm(slopes))  # so that the first step fits

    def scaled(x: np.ndarray) -> tuple[float, np.ndarray]:
        trial = known.get(point := tuple(map(float, x)))
        if trial is None or not math.isfinite(trial.value):
            raise _Unknown(None if trial else point)
        return (trial.value - first.value) * scale, np.array(trial.slopes) * scale

    try:
        with fitting_threads(len(start)):
            minimize(
                scaled, np.array(start), jac=True, method="L-BFGS-B", bounds=space.box,
                options={"maxfun": evaluations, "ftol": 1e-5, "gtol": 1e-5},
            )  # fmt: skip
    except _Unknown as unknown:
        return unknown.args[0]
    return None


def greedy_soup(space: Space) -> Generator[list[Wanted], Sequence[Trial], Point]:
    """Wortsman et al. 2022, recipe 1, with task vectors for ingredients: experts are tried alone
    and sorted; each joins the mean of those already chosen if that does not raise the objective."""
    count = len(space.experts)

    def mean_of(chosen: Sequence[int]) -> Point:
        return space.everywhere([(i in chosen) / len(chosen) for i in range(count)])

    alone = [mean_of([i]) for i in range(count)]
    trials = yield [(0, point, SOUP_NAME) for point in alone]
    values = {trial.point: trial.value for trial in trials if not trial.stage}
    order = sorted(range(count), key=lambda i: (values[alone[i]], i))
    chosen, soup = order[:1], alone[order[0]]
    for expert in order[1:]:
        larger = mean_of([*chosen, expert])
        trials = yield [(0, larger, SOUP_NAME)]
        values = {trial.point: trial.value for trial in trials if not trial.stage}
        if math.isfinite(values[larger]) and values[larger] <= values[soup]:
            chosen, soup = [*chosen, expert], larger
    return soup


class Search:
    """What is searched. `evaluations` and `seconds` (of all trials together) limit the sampler, not
    the stages above it; `with_soup` adds the greedy soup to the candidates, which `soup` tells once
    the search is over.

    Raises ConfigError where nothing is left to search for, or too much.
    """

    def __init__(
        self, method: str, space: Space, stages: Sequence[Stage], *, grid: Grid | None, seed: int,
        evaluations: int | None, seconds: float = math.inf, with_soup: bool = False,
    ) -> None:  # fmt: skip
        if not space.all_groups:
            raise ConfigError(
                "--coefficients-for sets every tensor, which leaves nothing to search for; leave "
                "out --search, or narrow the globs"
            )
        self.method, self.space, self.stages, self.seconds = method, space, stages, seconds
        self.grid, self.with_soup, count = grid, with_soup, len(space.experts)
        self.base = space.everywhere([0.0] * count)  # itself, where nothing is fixed otherwise
        self.mean = space.everywhere([1 / count] * count)
        self.soup: Point | None = None
        if grid is not None:
            points = grid_points(grid, len(space.all_groups))
            points = [point for point in points if point not in (self.base, self.mean)]
            num, self._sampler = evaluations or len(points), sample(points)
        elif method == "gradient":
            num = evaluations or DESCENT_STEPS * (2 if space.groups else 1)
            self._sampler = descend(space, num)
        else:
            num = evaluations or min(PER_NUMBER[method] * len(space.box), MOST)
            self._sampler = (
                sample(random_points(space, num, seed)) if method == "random"
                else evolve(space, seed) if method == "cmaes" else estimate(space, seed)
            )  # fmt: skip
        self.evaluations = num
        soup_size = 2 * count - 1 if with_soup else 0
        # how many trials it will take, about
        self.expected = 2 + num + soup_size + sum(stage.keep + 2 for stage in stages[:-1])
        self._steps = self._run_through()
        self._wanted: list[Wanted] | None = next(self._steps)

    def _run_through(self) -> Steps:
        """The whole search."""
        yield [(0, self.base, BASE_NAME), (0, self.mean, MEAN_NAME)]
        yield from self._sampler
        if self.with_soup:
            self.soup = yield from greedy_soup(self.space)
        for stage, below in enumerate(self.stages[:-1]):
            trials = yield []
            best = shortlist([t for t in trials if t.stage == stage], below.keep)
            yield [(stage + 1, trial.point, trial.name) for trial in best]

    def next(self, trials: Sequence[Trial]) -> Wanted | Literal["wait"] | None:
        """Stage, point and name of the next trial; "wait" for others; None at the end."""
        is_running = not all(trial.is_done for trial in trials)
        known = {(t.stage, t.point): t.is_done for t in trials}
        of_sampler = {(t.stage, t.point): t.is_done for t in trials if t.name != SOUP_NAME}
        first = [trial for trial in trials if not trial.stage]
        is_spent = (
            sum(not trial.name for trial in first) >= self.evaluations
            or sum(trial.seconds for trial in first) >= self.seconds
        )
        while self._wanted is not None:
            is_sampled = not any(stage or name for stage, _, name in self._wanted[:1])
            begun = of_sampler if is_sampled else known  # a soup teaches the sampler nothing
            free = next((one for one in self._wanted if one[:2] not in begun), None)
            if free and not (is_sampled and is_spent):
                return free
            if free and not is_running:
                self._sampler.close()  # its budget is used up
            elif free or not (
                all(begun[one[:2]] for one in self._wanted) or (is_sampled and self.method == "tpe")
            ):
                return "wait"
            try:
                self._wanted = self._steps.send(trials)
            except StopIteration:
                self._wanted = None
        return "wait" if is_running else None

    def run(self, journal: Journal, evaluate: Evaluate, between: Callable[[], None]) -> None:
        """Evaluate what is left. `between` is called after each trial, and while there is nothing
        to do but wait; it raises to stop."""
        while True:
            between()
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


def shortlist(trials: Sequence[Trial], keep: int) -> list[Trial]:
    """The best `keep` of a stage that are finite, from the best on; base and mean always pass."""
    finite = [trial for trial in ranked(trials) if math.isfinite(trial.value)]
    others = [trial for trial in finite if trial.name not in (BASE_NAME, MEAN_NAME)]
    return [trial for trial in finite if trial not in others[keep:]]


def conclude(
    search: Search, trials: Sequence[Trial], metrics: Sequence[str]
) -> tuple[Trial, dict[str, Any], list[str]]:
    """The best trial of the last stage, the search as the merged file tells of it, and what a
    person should be warned of.   metrics: what each stage has measured.

    Raises NumericsError where the last stage found nothing finite.
    """
    done = [trial for trial in trials if trial.is_done]
    by_stage = [[t for t in done if t.stage == stage] for stage in range(len(search.stages))]
    best, notes, stages = ranked(by_stage[-1])[0], list[str](), list[dict[str, Any]]()
    broken = [trial for trial in done if not math.isfinite(trial.value)]
    if search.method == "gradient" and any(t.name != SOUP_NAME and not t.stage for t in broken):
        notes.append(
            "the descent ended at a point whose objective was not finite; set narrower bounds in "
            "[merge], or take --search cmaes, which passes over such points"
        )
    if broken:
        notes.append(f"{len(broken)} of {len(done)} trials had no finite objective; skipped")
    if not any(best.point) and not search.space.fixed:
        notes.append("no candidate is better than the base; the merged model is the base itself")
    for index, (stage, metric) in enumerate(zip(search.stages, metrics, strict=True)):
        rho, shared = None, 0
        if index + 1 < len(by_stage):
            rho, shared = rank_correlation(by_stage[index], by_stage[index + 1])
        if rho is not None and rho < WEAK_RHO and shared >= ENOUGH:
            notes.append(
                f"{metric} and {metrics[index + 1]} rank the candidates differently (Spearman's "
                f"rho {rho:.2f} over {shared}): the first may have dropped what the second would "
                f"have chosen; keep more of them"
            )
        stages.append({
            "objective": metric, "num": stage.num, "evaluations": len(by_stage[index]),
            "keep": stage.keep, "rho_to_next": rho,
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


def rank_correlation(lower: Sequence[Trial], upper: Sequence[Trial]) -> tuple[float | None, int]:
    """Spearman's rho of two stages over the candidates that both have judged, and how many these
    are; None for fewer than 3 or where one gives all the same."""
    values = {trial.point: trial.value for trial in lower}
    pairs = [(values.get(trial.point, math.inf), trial.value) for trial in upper]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None, len(pairs)
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)
