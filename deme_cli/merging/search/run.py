"""The procedure of a search: one trial after another, until plan and ladder have nothing left.

Every step looks at the journal, decides under its lock what is next, evaluates it, and notes the
result; so it does not matter how often the procedure was stopped, or how many processes run it.
Rung 0 holds the references (the base, 1/N each), what the plan proposes, and the greedy soup; each
further rung the best of the one before. Nothing is printed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deme_cli.ladder import Rung
from deme_cli.merging.search.greedy import GreedySoup
from deme_cli.merging.search.journal import Journal
from deme_cli.merging.search.ladder import shortlist
from deme_cli.merging.search.plan import WAIT, Plan, Wait
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import (
    BASE_NAME,
    MEAN_NAME,
    SOUP_NAME,
    Asked,
    Trial,
    seconds_spent,
    trials_of,
)

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Evaluated:
    """The objective of a point, and what else came with it (the slopes, by the name `slopes`)."""

    value: float
    extra: Mapping[str, Any]


Evaluate = Callable[[int, Point, str], Evaluated]  # rung, point, name


@dataclass(frozen=True)
class Search:
    """What is searched. `evaluations` and `seconds` limit the plan, not the rungs above it;
    `with_soup` adds the greedy soup to the candidates."""

    space: Space
    plan: Plan
    rungs: Sequence[Rung]
    evaluations: int
    seconds: float | None = None
    with_soup: bool = False

    @property
    def expected(self) -> int:
        """How many trials it will take, about."""
        soup = GreedySoup(self.space).evaluations if self.with_soup else 0
        upper = [rung.keep + 2 for rung in self.rungs[:-1]]
        return 2 + self.evaluations + soup + sum(upper)

    def next(self, asked: Sequence[Asked]) -> tuple[int, Point, str] | Wait | None:
        """Rung, point and name of the next trial; None at the end."""
        step = self._next_of_plan([one for one in asked if one.rung == 0])
        if step is not None:
            return WAIT if isinstance(step, Wait) else (0, *step)
        for rung in range(1, len(self.rungs)):
            below = [one for one in asked if one.rung == rung - 1]
            if any(one.value is None for one in below):
                return WAIT
            begun = {one.point for one in asked if one.rung == rung}
            for trial in shortlist(trials_of(below), self.rungs[rung - 1].keep):
                if trial.point not in begun:
                    return rung, trial.point, trial.name
        return WAIT if any(one.value is None for one in asked) else None

    def _next_of_plan(self, asked: Sequence[Asked]) -> tuple[Point, str] | Wait | None:
        begun = {one.point for one in asked}
        for point, name in ((self.space.base, BASE_NAME), (self.space.mean, MEAN_NAME)):
            if point not in begun:
                return point, name
        proposed = [one for one in asked if not one.name]
        is_over = len(proposed) >= self.evaluations or (
            self.seconds is not None and seconds_spent(asked) >= self.seconds
        )
        name, seen = "", [one for one in asked if one.name != SOUP_NAME]  # the soup comes after
        step = None if is_over else self.plan.propose(seen)
        if step is None and self.with_soup:
            name, step = SOUP_NAME, GreedySoup(self.space).propose(asked)
        return (step, name) if isinstance(step, tuple) else step

    def run(
        self, journal: Journal, evaluate: Evaluate, check: Callable[[], None]
    ) -> Iterator[Trial]:
        """Evaluate what is left; yields each trial of this process once it is on disk.

        `check` is called while there is nothing to do but wait, and raises to stop.
        """
        while True:
            check()
            with journal.planning() as asked:
                step = self.next(asked)
                if isinstance(step, tuple):
                    trial_id = journal.start(*step)
            if step is None:
                return
            if isinstance(step, Wait):
                time.sleep(POLL_SECONDS)
                continue
            try:
                found = evaluate(*step)
            except BaseException:
                journal.give_back(trial_id)
                raise
            yield journal.finish(trial_id, found.value, dict(found.extra))
