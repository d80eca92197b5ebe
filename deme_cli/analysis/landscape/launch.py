"""Places of a landscape shared by the processes of a launch, each on its own device.

The first process tells every other one which place to measure, measures one itself, and gathers the
errors; so a round takes as long as its slowest. Only the first knows what the places are for and
keeps the errors. k coordinates, n draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from deme_cli.analysis.landscape.field import Crew, Field, Measured, Place
from deme_cli.interrupts import StopRequests
from deme_cli.processes import World
from deme_cli.training.held_out import Check

_NOTHING, _FIXED, _FRESH, _END = range(4)  # what to do: which draws to measure on
_MOST_COORDINATES = 2


@contextmanager
def lead_launch(field: Field, world: World, check: Check) -> Iterator[Crew]:
    """A `Crew` of all processes of `world`; the others of it are to call `help_landscape`."""
    try:
        yield partial(_share, field, world, check)
    except GeneratorExit:  # given up by a caller that fails to draw it
        _tell(world, [_END] * world.size)
        raise
    _tell(world, [_END] * world.size)


def _share(field: Field, world: World, check: Check, places: Sequence[Place]) -> Measured:
    """Measure the places in order, a round after the other.

    Raises what `check` raises, Lost where another process has ended.
    """
    for start in range(0, len(places), world.size):
        check()
        part = places[start : start + world.size]
        _tell(world, part)
        gathered = world.gather(field.errors(part[0], check))
        yield from enumerate(gathered[: len(part)], start)


def help_landscape(field: Field, world: World) -> None:
    """Measure the places that the first process tells, until it has them all.

    Raises Stopped after a signal, Lost where another process has ended.
    """
    with StopRequests() as stop:

        def check(*progress: int) -> None:
            if stop.asked:
                raise stop.stopped("stopped; run the same command again to continue")

        while (told := _hear(world)) != _END:
            check()
            world.gather(field.errors(told, check) if isinstance(told, Place) else np.empty(0))


def _tell(world: World, orders: Sequence[Place | int]) -> None:
    """A row for each process: what, a model's number or -1, how many coordinates, and these."""
    rows = _rows(world)
    for row, order in zip(rows, orders, strict=False):
        if isinstance(order, Place):
            model = -1 if order.model is None else order.model
            what, count = _FRESH if order.fresh else _FIXED, len(order.coordinates)
            row[:3] = torch.tensor([what, model, count])
            row[3 : 3 + count] = torch.tensor(order.coordinates, dtype=row.dtype)
        else:
            row[0] = order
    world.add_up(rows)


def _hear(world: World) -> Place | int:
    """What this process is told: a place, _NOTHING or _END."""
    rows = _rows(world)
    world.add_up(rows)
    what, model, count, *coordinates = rows[world.rank].tolist()
    if what in (_NOTHING, _END):
        return int(what)
    chosen = tuple(coordinates[: int(count)])
    return Place(chosen, None if model < 0 else int(model), fresh=what == _FRESH)


def _rows(world: World) -> torch.Tensor:
    """Zeros, to which the first process adds what it tells."""
    return torch.zeros(world.size, 3 + _MOST_COORDINATES, dtype=torch.float64)
