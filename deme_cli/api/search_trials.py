"""The trials of `deme merge --search`: opened and run, by one process or by those of a launch.

The journal beside the output is all that they share: each process takes what is free from it. So
that all of them begin with the same one, the first opens it before the others do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.caching import fill_with_bar
from deme_cli.api.merge_order import Order
from deme_cli.api.merge_settings import parse_time
from deme_cli.api.search_plan import open_plan
from deme_cli.interrupts import StopRequests
from deme_cli.merging.search.trials import trials_of
from deme_cli.processes import Lost, World

if TYPE_CHECKING:
    from deme_cli.merging.search.distances import FeatureStore
    from deme_cli.merging.search.evaluator import Evaluator
    from deme_cli.merging.search.journal import Journal
    from deme_cli.merging.search.measure import Measure
    from deme_cli.merging.search.objectives import Objective, Workbench
    from deme_cli.merging.search.run import Search
    from deme_cli.merging.search.space import Space
    from deme_cli.merging.search.trials import Asked, Trial

MOST_SHOWN = 8  # coefficients named in a line about one trial
_ASK_SECONDS = 1.0  # between two looks for a process that has failed


@dataclass(frozen=True)
class Trials:
    """A search whose network and images are loaded, and the processes that share it."""

    order: Order
    search: Search
    objectives: Sequence[Objective]
    evaluator: Evaluator
    workbench: Workbench
    features: FeatureStore
    world: World

    @property
    def space(self) -> Space:
        return self.search.space

    def journal(self) -> Journal:
        """Where they are kept; to be entered."""
        from deme_cli.merging.search.journal import Journal

        document = describe(self.order, self.space, self.objectives)
        return Journal(journal_path(self.order.output), self.space.labels, document)

    def run(self, journal: Journal) -> list[Asked]:
        """Evaluate those that are left, shown as they come; all of them in the end.

        Raises Stopped after a signal, Lost where another process of the launch has failed.
        """
        others, shown = _Others(self.world), set[int]()
        with (
            StopRequests() as stop,
            console.progress(self.order.search, self.search.expected, "trial") as bar,
        ):

            def show() -> None:
                """Each new trial as a line, and the best so far in the bar."""
                trials = trials_of(journal.asked())
                for trial in trials:
                    if trial.index not in shown:
                        shown.add(trial.index)
                        bar.say(self._line(trial))
                if trials:
                    last = trials[-1]
                    label = self.objectives[last.rung].label
                    bar.advance(len(trials), f"best {label} {shown_value(last.best)}")

            def check(done: int = 0, total: int = 0) -> None:
                if stop.asked:
                    raise stop.stopped(_kept(journal))
                if others.have_failed():
                    raise Lost(f"another process of this launch has ended; {_kept(journal)}")

            def between() -> None:
                check()
                if not self.world.is_alone:
                    show()  # also while this one waits for others

            self.evaluator.check = check
            if kept := self._open(journal):
                console.note(f"{journal.path}: continuing after {kept} trials")
                shown.update(trial.index for trial in trials_of(journal.asked()))
            for _ in self.search.run(journal, self.evaluator, between):
                show()
            show()
        return journal.asked()

    def _line(self, trial: Trial) -> str:
        """`trial 17/64: held-out loss 0.09312 at 0.2 0.1 (1.2 s)`."""
        name = f" ({trial.name})" if trial.name else ""
        values = self.space.summary(trial.point)
        more = f" and {len(values) - MOST_SHOWN} more" if len(values) > MOST_SHOWN else ""
        w = " ".join(f"{value:.3g}" for value in values[:MOST_SHOWN]) + more
        what = "mean w" if self.space.groups else "w"
        return (
            f"trial {trial.index + 1}/{self.search.expected}{name}: "
            f"{self.objectives[trial.rung].label} {shown_value(trial.objective)} at {what} {w} "
            f"({trial.seconds:.1f} s)"
        )

    def _open(self, journal: Journal) -> int:
        """How many are done. The first process opens it, and where it was asked to, empties it;
        and none ends the search before all have looked at its output."""
        order, world = self.order, self.world
        world.require_same({"output": str(order.output), **journal.search})
        world.wait()  # nothing is begun before all agree
        with world.first_before_others():
            return journal.open(force=order.force and world.is_first)


def shown_value(value: float) -> str:
    """Five digits, or what stands in their place."""
    return f"{value:.5g}" if math.isfinite(value) else "not finite"


class _Others:
    """The other processes of a launch, asked at most once a second: each question is a message."""

    def __init__(self, world: World) -> None:
        self._world, self._asked = world, time.monotonic()

    def have_failed(self) -> bool:
        if time.monotonic() - self._asked < _ASK_SECONDS:
            return False
        self._asked = time.monotonic()
        return self._world.failure() > 0


def open_trials(order: Order, measure: Measure, world: World) -> Trials:
    """Load the network and the images before the first trial, whose time it is not."""
    with console.waiting("loading the libraries, the network and the images"):
        from deme_cli.merging.search.distances import FeatureStore
        from deme_cli.merging.search.evaluator import Evaluator
        from deme_cli.merging.search.objectives import Workbench

        space, rungs, path = order.space(), order.rungs, journal_path(order.output)
        search = _open_search(order, space)
        store = FeatureStore(path.with_name(f".{path.name}.features"))
        bench = Workbench(
            measure, order.family.base_record, store=store if len(rungs) > 1 else None
        )
        evaluator = Evaluator(
            order.family, space, method=order.method, device=order.device, dtype=order.dtype,
            with_slopes=search.plan.needs_slopes,
        )  # fmt: skip
    if not all(rung.is_distance for rung in rungs):
        fill_with_bar(bench.examples, world=world)
    evaluator.objectives = objectives = [
        bench.open(rung, order.settings, experts=evaluator.ensemble) for rung in rungs
    ]
    evaluator.open()
    return Trials(order, search, objectives, evaluator, bench, store, world)


def help_search(order: Order, measure: Measure, world: World) -> None:
    """Evaluate trials for the first process of the launch until none is left."""
    trials = open_trials(order, measure, world)
    with trials.journal() as journal:
        trials.run(journal)


def journal_path(output: Path) -> Path:
    """The trials of the search for `output`."""
    return output.with_name(f"{output.stem}.trials.jsonl")


def _kept(journal: Journal) -> str:
    done = len(trials_of(journal.asked()))
    return f"{done} trials are saved in {journal.path}; run the same command again to continue"


def _open_search(order: Order, space: Space) -> Search:
    from deme_cli.merging.search.run import Search

    settings, plan = order.settings, open_plan(order, space)
    return Search(
        space, plan, order.rungs, settings.evaluations or plan.evaluations,
        parse_time(settings.time) if settings.time else None,
        with_soup=order.reports,
    )  # fmt: skip


def describe(order: Order, space: Space, objectives: Sequence[Any]) -> dict[str, Any]:
    """Everything the trials depend on; budgets are left out where they can be changed."""
    settings = order.settings
    grid = order.grid() if order.search == "grid" else None
    return {
        "method": order.search,
        "parents": [parent.record.fingerprint for parent in order.family.parents],
        "base": order.family.base_record.fingerprint,
        "combination": {"name": order.method.name, **order.method.used},
        "groups": list(space.all_groups),
        "fixed": {glob: list(w) for glob, w in space.fixed.items()},
        "grid": [list(values) for values in grid] if grid else None,
        "bounds": [list(pair) for pair in space.bounds] if order.search != "grid" else None,
        "start": list(space.start),
        "evaluations": settings.evaluations if space.groups else None,
        "seed": settings.seed,
        "objectives": [{**one.protocol, "dtype": order.dtype} for one in objectives],
        "keep": [rung.keep for rung in order.rungs[:-1]],
    }
