"""How far a landscape is: the places measured so far, among the arrays that are kept of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from deme_cli.analysis.landscape.field import Crew, Place
from deme_cli.analysis.landscape.groups import Groups
from deme_cli.analysis.unfinished import Step, Unfinished
from deme_cli.processes import Lost

_UNMEASURED = -1.0  # no loss is negative; one that is not finite is kept as nan


class Progress:
    """A row for each place, filled by the crew. `total`: of all places, at most."""

    def __init__(self, kept: Unfinished, crew: Crew, total: int) -> None:
        self.kept, self.crew, self.total = kept, crew, total

    def rows(self, name: str, count: int, width: int) -> np.ndarray:
        """A row for each of some places, as kept or still to be measured: (count, width)."""
        return self.kept.arrays.setdefault(name, np.full((count, width), _UNMEASURED))

    @property
    def done(self) -> int:
        return sum(int((rows[:, 0] != _UNMEASURED).sum()) for rows in self.kept.arrays.values())

    @property
    def note(self) -> str:
        return f"continuing after {self.done} points" if self.done else self.kept.note

    def fill(
        self, name: str, places: Sequence[Place], groups: Groups | None = None
    ) -> Iterator[Step]:
        """Measure what is left of these places; of each the means of groups, or every error."""
        rows, kept = self.kept.arrays[name], self.kept
        left = [index for index in range(len(places)) if rows[index, 0] == _UNMEASURED]
        kept.done = f"{self.done} of {self.total} points"
        try:
            for number, errors in self.crew([places[index] for index in left]):
                errors = np.where(np.isfinite(errors), errors, np.nan)
                rows[left[number]] = groups.means(errors) if groups else errors
                kept.done = f"{self.done} of {self.total} points"
                kept.save_now_and_then()
                yield Step(self.done)
        except Lost:  # another process of the launch has ended
            kept.save()
            raise
