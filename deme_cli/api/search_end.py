"""What `deme merge --search` does: run the trials, conclude from them, show what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.merge_order import Order
from deme_cli.api.search_trials import open_trials
from deme_cli.merging.search.trials import BASE_NAME, MEAN_NAME, trials_of
from deme_cli.outputs import file_lock, write_whole
from deme_cli.processes import World

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from deme_cli.merging.coefficients import Coefficients
    from deme_cli.merging.search.conclusion import Conclusion
    from deme_cli.merging.search.evaluator import Evaluator
    from deme_cli.merging.search.journal import Journal
    from deme_cli.merging.search.measure import Measure
    from deme_cli.merging.search.objectives import Objective, Workbench
    from deme_cli.merging.search.run import Search
    from deme_cli.merging.search.space import Point, Space
    from deme_cli.merging.search.trials import Asked, Trial


@dataclass(frozen=True)
class Found:
    """The best point, what it means, how it was found, and the files that tell it."""

    point: Point
    coefficients: Coefficients
    record: dict[str, Any]
    journal: Journal
    pictures: Sequence[Path]
    evaluator: Evaluator
    workbench: Workbench
    soup: Point | None


@contextmanager
def search_coefficients(order: Order, measure: Measure, world: World) -> Iterator[Found]:
    """Run the trials that are left; show the best as a table and all as pictures.

    While it is entered, this process counts as one that works on the journal. The others of its
    launch are to call `help_search`.
    """
    from deme_cli.merging.search.conclusion import conclude
    from deme_cli.merging.search.figure import draw_search

    trials = open_trials(order, measure, world)
    search, objectives, evaluator = trials.search, trials.objectives, trials.evaluator
    space = trials.space
    with trials.journal() as journal:
        asked = trials.run(journal)
        end = conclude(search, asked, objectives, evaluator.ranges)
        _tell(order, search, end, asked, objectives)
        labels, best = [one.label for one in objectives], end.best.point
        picture = order.output.with_name(f"{order.output.stem}.search.png")
        write_whole(picture, [draw_search(trials_of(asked), space.labels, labels)])
        yield Found(
            best, space.coefficients(best), _record(order, search, end, objectives), journal,
            [picture], evaluator, trials.workbench, _soup(search, asked),
        )  # fmt: skip
        trials.features.clear()


@contextmanager
def finishing(journal: Journal, check: Callable[[], None]) -> Iterator[bool]:
    """Only one process writes the end: waits for its turn, tells whether the end is still open.

    `check` is called while it waits, and raises to stop.
    """
    place = journal.path.with_name(f".{journal.path.name}.end")
    lock = file_lock(place)
    while not _take(lock):
        check()
    try:
        yield journal.merged is None
        place.unlink(missing_ok=True)  # whoever still waits for it will find the end in the journal
    finally:
        lock.release()


def _take(lock: BaseFileLock) -> bool:
    """Whether the lock could be had within half a second."""
    try:
        lock.acquire(timeout=0.5)
    except TimeoutError:
        return False
    return True


def _soup(search: Search, asked: Sequence[Asked]) -> Point | None:
    """The greedy soup, where the search has tried it."""
    from deme_cli.merging.search.greedy import GreedySoup

    if not search.with_soup:
        return None
    return GreedySoup(search.space).soup([one for one in asked if one.rung == 0])


def _tell(
    order: Order, search: Search, end: Conclusion, asked: Sequence[Asked],
    objectives: Sequence[Objective],
) -> None:  # fmt: skip
    """What a person should know of the end, and the table of the best."""
    from deme_cli.merging.search.ladder import ENOUGH, WEAK_RHO

    for remark in search.plan.remarks([one for one in asked if one.rung == 0]):
        console.warn(remark)
    if end.broken:
        console.warn(f"{end.broken} of {end.evaluations} trials had no finite objective; skipped")
    for rung, rho in enumerate(end.rhos, start=1):
        if rho is not None and rho < WEAK_RHO and end.shared[rung - 1] >= ENOUGH:
            console.warn(
                f"{objectives[rung - 1].label} and {objectives[rung].label} rank the candidates "
                f"differently (Spearman's rho {rho:.2f} over {end.shared[rung - 1]}): the first "
                f"may have dropped what the second would have chosen; keep more of them"
                f"{_hint(end.rhos_by_range[rung - 1], rho)}"
            )
    if not any(end.best.point) and not search.space.fixed:
        console.warn("no candidate is better than the base; the merged model is the base itself")
    _show_best(
        end.ranking,
        search.space,
        objectives[-1].label,
        end.evaluations,
        shown=search.rungs[-1].keep,
    )


def _hint(rhos: Mapping[str, float], rho: float) -> str:
    """Names the range whose loss alone ranks well, if there is one."""
    from deme_cli.merging.search.ladder import WEAK_RHO

    span = max(rhos, key=lambda name: rhos[name], default=None)
    if span is None or rhos[span] < max(rho, WEAK_RHO):
        return ""
    return (
        f', or set loss_range = "{span}" in [merge], where the loss ranks better ({rhos[span]:.2f})'
    )


def _record(
    order: Order, search: Search, end: Conclusion, objectives: Sequence[Objective]
) -> dict[str, Any]:
    """How the coefficients were found, as the merged file tells it."""
    is_grid = order.search == "grid"
    return {
        "method": order.search,
        **end.record,
        "grid": [list(values) for values in order.grid()] if is_grid else None,
        "bounds": None if is_grid else [list(pair) for pair in search.space.bounds],
        "per": order.settings.per,
        "seed": order.settings.seed,
        "num": order.rungs[-1].num,
        "protocol": {**objectives[-1].protocol, "dtype": order.dtype},
    }


def _show_best(
    ranking: Sequence[Trial], space: Space, label: str, count: int, *, shown: int
) -> None:
    """The first of the ranking, and below them the base and the mean with their places."""
    rows = [
        [f"{place} {trial.name}".strip(), *(f"{w:.3g}" for w in space.summary(trial.point)),
         f"{trial.objective:.6g}" if math.isfinite(trial.objective) else "not finite"]
        for place, trial in enumerate(ranking, start=1)
        if place <= shown or trial.name in (BASE_NAME, MEAN_NAME)
    ]  # fmt: skip
    what = "mean w" if space.groups else "w"
    console.table(
        f"The best of {count} candidates",
        ["place", *(f"{what} {name}" for name in space.experts), label],
        rows,
    )
