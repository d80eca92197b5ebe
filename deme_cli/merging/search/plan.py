"""What a search is: a plan that says, from all trials so far, which point comes next.

A plan holds no state of its own. It is asked again after every trial and works from the trials it
is shown and its seed alone, so a search that was interrupted, or is shared by several processes,
asks for the same points as one that ran through. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from deme_cli.merging.search.space import Point
from deme_cli.merging.search.trials import Asked

Known = Mapping[Point, float | None]  # None: being evaluated


class Wait:
    """The next point depends on trials that others are still evaluating."""


WAIT = Wait()


class Plan(Protocol):
    """`evaluations` is how many trials it wants if nobody says otherwise; `needs_slopes` whether
    each must come with the gradient of the objective."""

    evaluations: int
    needs_slopes: bool = False

    def propose(self, trials: Sequence[Asked]) -> Point | Wait | None:
        """The next point, WAIT, or None at the end."""
        ...

    def remarks(self, trials: Sequence[Asked]) -> list[str]:
        """What a person should know of these trials."""
        return []


def needed(points: Iterable[Point], known: Known) -> Point | Wait | None:
    """The first of `points` that nobody has begun, WAIT until all are evaluated, then None."""
    is_running = False
    for point in points:
        if point not in known:
            return point
        is_running = is_running or known[point] is None
    return WAIT if is_running else None
