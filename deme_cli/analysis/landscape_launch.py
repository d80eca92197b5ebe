"""Points of a landscape shared by the processes of a launch, each on its own device.

The first process tells every other one which place to measure, measures one itself, and gathers the
errors; so a round takes as long as its slowest. Only the first knows what the points are for and
keeps them. k coordinates, n draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np
import torch

from deme_cli.analysis.landscape_workers import Crew, Field, Place
from deme_cli.interrupts import StopRequests
from deme_cli.processes import World
from deme_cli.training.held_out import Check

_NOTHING, _FIXED, _FRESH, _END = range(4)  # what to do: which draws to measure on
_MOST_COORDINATES = 2


def open_crew(field: Field, world: World) -> Crew | LaunchCrew:
    """Who measures the points; the others of a launch are to call `help_landscape`."""
    return Crew(field) if world.is_alone else LaunchCrew(field, world)


class LaunchCrew:
    """The processes of a launch; used as `Crew` is, by the first of them."""

    def __init__(self, field: Field, world: World) -> None:
        self.field, self.world = field, world

    def __enter__(self) -> LaunchCrew:
        return self

    def measure(
        self, places: Sequence[tuple[int, Place]], check: Check, *, fresh: bool
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The index and the errors (n,) of each place, in order.

        Raises what `check` raises, Lost where another process has ended.
        """
        for start in range(0, len(places), self.world.size):
            check()
            part = places[start : start + self.world.size]
            _tell(self.world, [place for _, place in part], _FRESH if fresh else _FIXED)
            own = self.field.errors(part[0][1], check, fresh=fresh)
            for (index, _), errors in zip(part, self.world.gather(own), strict=False):
                yield index, errors

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, GeneratorExit):
            _tell(self.world, [Place()] * self.world.size, _END)


def help_landscape(field: Field, world: World) -> None:
    """Measure the places that the first process tells, until it has them all.

    Raises Stopped after a signal, Lost where another process has ended.
    """
    with StopRequests() as stop:

        def check(*progress: int) -> None:
            if stop.asked:
                raise stop.stopped("stopped; run the same command again to continue")

        while True:
            what, place = _hear(world)
            if what == _END:
                return
            check()
            errors = np.empty(0)
            if what != _NOTHING:
                errors = field.errors(place, check, fresh=what == _FRESH)
            world.gather(errors)


def _tell(world: World, places: Sequence[Place], what: int) -> None:
    """A row for each process: what, a model's number or -1, how many coordinates, and these."""
    rows = _rows(world)
    for row, place in zip(rows, places, strict=False):
        model, count = -1 if place.model is None else place.model, len(place.coordinates)
        row[:3] = torch.tensor([what, model, count])
        row[3 : 3 + count] = torch.tensor(place.coordinates, dtype=row.dtype)
    world.add_up(rows)


def _hear(world: World) -> tuple[int, Place]:
    """What this process is told."""
    rows = _rows(world)
    world.add_up(rows)
    what, model, count, *coordinates = rows[world.rank].tolist()
    return int(what), Place(tuple(coordinates[: int(count)]), None if model < 0 else int(model))


def _rows(world: World) -> torch.Tensor:
    """Zeros, to which the first process adds what it tells."""
    return torch.zeros(world.size, 3 + _MOST_COORDINATES, dtype=torch.float64)
