"""The procedure of a search: one trial after another, until sampler and ladder have nothing left.

Every step looks at the journal, decides under its lock what is next, evaluates it, and notes the
result; so it does not matter how often the procedure was stopped, or how many processes run it.
Stage 0 holds the references (the base, 1/N each), what the sampler proposes, and the greedy soup;
each further stage the best of the one before (successive halving). Nothing is printed here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deme_cli.errors import ConfigError
from deme_cli.merging.journal import Journal
from deme_cli.merging.samplers import (
    WAIT,
    CoarseToFine,
    Propose,
    first_free,
    greedy_soup,
    open_sampler,
    usual_evaluations,
)
from deme_cli.merging.space import (
    BASE_NAME,
    BY_RANGE,
    MEAN_NAME,
    REFERENCES,
    SOUP_NAME,
    Grid,
    Point,
    Space,
    Trial,
    grid_points,
    ranked,
    resolve_grid,
    seconds_spent,
)
from deme_cli.merging.successive_halving import Stage
from deme_cli.timesteps import TimestepRange

if TYPE_CHECKING:
    from deme_cli.merging.objectives import Objective

POLL_SECONDS = 0.2
WEAK_RHO, ENOUGH = 0.5, 8  # a correlation that is weak; candidates from which it says something
Evaluate = Callable[[int, Point, str], tuple[float, Mapping[str, Any]]]  # stage, point, name
Next = tuple[int, Point, str]


@dataclass(frozen=True)
class Search:
    """What is searched. `evaluations` and `seconds` limit the sampler, not the stages above it;
    `with_soup` adds the greedy soup to the candidates."""

    method: str
    space: Space
    propose: Propose
    stages: Sequence[Stage]
    evaluations: int
    seconds: float | None = None
    with_soup: bool = False

    @property
    def expected(self) -> int:
        """How many trials it will take, about."""
        soup = 2 * self.space.num_experts - 1 if self.with_soup else 0
        return 2 + self.evaluations + soup + sum(stage.keep + 2 for stage in self.stages[:-1])

    def next(self, trials: Sequence[Trial]) -> Next | str | None:
        """Stage, point and name of the next trial; WAIT for others; None at the end."""
        step = self._next_of_first([trial for trial in trials if trial.stage == 0])
        if step is not None:
            return (0, *step) if isinstance(step, tuple) else WAIT
        for stage in range(1, len(self.stages)):
            below = [trial for trial in trials if trial.stage == stage - 1]
            if not all(trial.is_done for trial in below):
                return WAIT
            begun = {trial.point for trial in trials if trial.stage == stage}
            for trial in shortlist(below, self.stages[stage - 1].keep):
                if trial.point not in begun:
                    return stage, trial.point, trial.name
        return None if all(trial.is_done for trial in trials) else WAIT

    def _next_of_first(self, trials: Sequence[Trial]) -> tuple[Point, str] | str | None:
        begun = {trial.point for trial in trials}
        for point, name in ((self.space.base, BASE_NAME), (self.space.mean, MEAN_NAME)):
            if point not in begun:
                return point, name
        is_over = sum(not trial.name for trial in trials) >= self.evaluations or (
            self.seconds is not None and seconds_spent(trials) >= self.seconds
        )
        if not is_over:  # the soup comes after, and teaches nothing
            step = self.propose([trial for trial in trials if trial.name != SOUP_NAME])
            if step is not None:
                return step if isinstance(step, str) else (step, "")
        step = greedy_soup(self.space, trials)[0] if self.with_soup else None
        return step if step is None or isinstance(step, str) else (step, SOUP_NAME)

    def soup(self, trials: Sequence[Trial]) -> Point | None:
        """The greedy soup, where the search has tried it."""
        own = [trial for trial in trials if trial.stage == 0]
        return greedy_soup(self.space, own)[1] if self.with_soup else None

    def run(self, journal: Journal, evaluate: Evaluate, check: Callable[[], None]) -> Iterator[int]:
        """Evaluate what is left; yields the number of each trial once it is on disk.

        `check` is called while there is nothing to do but wait, and raises to stop.
        """
        while True:
            check()
            with journal.asking() as trials:
                step = self.next(trials)
                number = journal.start(*step) if isinstance(step, tuple) else -1
            if step is None:
                return
            if not isinstance(step, tuple):
                time.sleep(POLL_SECONDS)
                continue
            try:
                value, extra = evaluate(*step)
            except BaseException:
                journal.give_back(number)
                raise
            journal.finish(number, value, dict(extra))
            yield number


def open_search(
    method: str, space: Space, stages: Sequence[Stage], *, grid: Grid | None, seed: int,
    evaluations: int | None, seconds: float | None = None, with_soup: bool = False,
) -> Search:  # fmt: skip
    """The search that `--search` names; where groups differ, coarse to fine unless it is a grid.

    Raises ConfigError where nothing is left to search for, or too much.
    """
    if not space.dimensions:
        raise ConfigError(
            "--coefficients-for sets every tensor, which leaves nothing to search for; leave out "
            "--search, or narrow the globs"
        )
    propose: Propose
    if grid is not None:
        lists = [list(values) for values in grid] * len(space.all_groups)
        points = grid_points(resolve_grid(lists, space.dimensions) if space.groups else grid)
        points = [point for point in points if point not in (space.base, space.mean)]
        num = len(points)
        propose = lambda trials: first_free(points, trials)  # noqa: E731
    elif space.groups:
        fine = CoarseToFine(method, space, seed, evaluations)
        propose, num = fine.propose, fine.evaluations
    else:
        num = evaluations or usual_evaluations(method, space)
        propose = open_sampler(method, space, seed, num)
    return Search(method, space, propose, stages, evaluations or num, seconds, with_soup)


def shortlist(trials: Sequence[Trial], keep: int) -> list[Trial]:
    """The best `keep` of a stage that are finite, from the best on; base and mean always pass."""
    finite = [trial for trial in ranked(trials) if math.isfinite(trial.value)]
    kept = [trial for trial in finite if trial.name not in REFERENCES][:keep]
    return [trial for trial in finite if trial in kept or trial.name in REFERENCES]


@dataclass(frozen=True)
class Conclusion:
    """`ranking` of the last stage, best first; `record` as the merged file tells of the search;
    `warnings`: what a person should know of its trials."""

    ranking: Sequence[Trial]
    record: dict[str, Any]
    warnings: Sequence[str]

    @property
    def best(self) -> Trial:
        return self.ranking[0]


def conclude(
    search: Search, trials: Sequence[Trial], objectives: Sequence[Objective],
    ranges: Sequence[TimestepRange] = (),
) -> Conclusion:  # fmt: skip
    """Sum up the trials. Raises NumericsError where the last stage found nothing finite."""
    done = [trial for trial in trials if trial.is_done]
    by_stage = [[t for t in done if t.stage == stage] for stage in range(len(search.stages))]
    ranking = ranked(by_stage[-1])
    named = {trial.name: trial.value for trial in by_stage[-1] if trial.name}
    values = {
        "base": named.get(BASE_NAME), "mean": named.get(MEAN_NAME), "best": ranking[0].value,
    }  # fmt: skip
    stages: list[dict[str, Any]] = []
    warnings = _warnings(search, done, ranking[0])
    for index, (stage, objective, own) in enumerate(
        zip(search.stages, objectives, by_stage, strict=True)
    ):
        rho, by_range, shared = None, {}, 0
        if index + 1 < len(by_stage):
            upper = by_stage[index + 1]
            shared = len({t.point for t in own} & {t.point for t in upper})
            rho, by_range = rank_correlation(own, upper), correlations_by_range(own, upper, ranges)
            if rho is not None and rho < WEAK_RHO and shared >= ENOUGH:
                warnings.append(
                    f"{objective.label} and {objectives[index + 1].label} rank the candidates "
                    f"differently (Spearman's rho {rho:.2f} over {shared}): the first may have "
                    f"dropped what the second would have chosen; keep more of them"
                    f"{_better_range(by_range, rho)}"
                )
        stages.append({
            "objective": objective.name, "num": stage.num, "evaluations": len(own),
            "keep": stage.keep, "rho_to_next": rho, "rho_to_next_by_range": by_range,
        })  # fmt: skip
    record = {
        "objective": objectives[-1].name,
        "evaluations": len(done),
        "seconds": round(seconds_spent(done), 3),
        "best": ranking[0].value,
        "values": {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()},
        "rungs": stages,
    }
    return Conclusion(ranking, record, warnings)


def _warnings(search: Search, done: Sequence[Trial], best: Trial) -> list[str]:
    """What was broken, and where nothing was found."""
    found = []
    broken = [trial for trial in done if not math.isfinite(trial.value)]
    if search.method == "gradient" and any(t.name != SOUP_NAME and t.stage == 0 for t in broken):
        found.append(
            "the descent ended at a point whose objective was not finite; set narrower bounds in "
            "[merge], or take --search cmaes, which passes over such points"
        )
    if broken:
        found.append(f"{len(broken)} of {len(done)} trials had no finite objective; skipped")
    if not any(best.point) and not search.space.fixed:
        found.append("no candidate is better than the base; the merged model is the base itself")
    return found


def _better_range(rhos: Mapping[str, float], rho: float) -> str:
    """Names the range whose loss alone ranks well, if there is one."""
    span = max(rhos, key=lambda name: rhos[name], default=None)
    if span is None or rhos[span] < max(rho, WEAK_RHO):
        return ""
    return f', or set loss_range = "{span}" in [merge], where it ranks better ({rhos[span]:.2f})'


def rank_correlation(lower: Sequence[Trial], upper: Sequence[Trial]) -> float | None:
    """Spearman's rho of two stages over the candidates that both have judged; None for fewer than 3
    or where one gives all the same."""
    return _spearman({trial.point: trial.value for trial in lower}, upper)


def correlations_by_range(
    lower: Sequence[Trial], upper: Sequence[Trial], ranges: Sequence[TimestepRange]
) -> dict[str, float]:
    """Spearman's rho of the loss on each range alone with the next stage, where there is one."""
    losses = {trial.point: trial.extra[BY_RANGE] for trial in lower if BY_RANGE in trial.extra}
    found = {}
    for index, span in enumerate(ranges):
        rho = _spearman({point: by_range[index] for point, by_range in losses.items()}, upper)
        if rho is not None:
            found[str(span)] = rho
    return found


def _spearman(lower: Mapping[Point, float | None], upper: Sequence[Trial]) -> float | None:
    """Over the points with a finite value in both."""
    from scipy.stats import spearmanr

    pairs = []
    for trial in upper:
        value = lower.get(trial.point)
        if value is not None and math.isfinite(value) and math.isfinite(trial.value):
            pairs.append((value, trial.value))
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)
