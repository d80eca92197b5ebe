"""Images in batches, shared out among the processes of a launch and brought together in order.

Batch k of those to be made goes to process k % size, so that a round, one batch of each process, is
the next piece of the whole. After every round the first process gets what the others made. Batches
are those of one process, whoever makes them, and so is every bit of what comes out.
B batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np

from deme_cli.distributed import ALONE, JointStopRequests, Lost, World

_LISTEN_SECONDS = 0.2  # all processes ask one store, and steps may take a millisecond

T = TypeVar("T")


@dataclass(frozen=True)
class Shares:
    """Images first .. num - 1 in batches of `batch_size` (the last one may be smaller)."""

    num: int
    batch_size: int
    first: int = 0
    world: World = ALONE

    @property
    def own(self) -> list[range]:
        """The batches of this process."""
        step = self.batch_size
        starts = range(self.first + self.world.rank * step, self.num, self.world.size * step)
        return [range(start, min(start + step, self.num)) for start in starts]

    def num_done(self, num_rounds: int) -> int:
        """Images that are there after so many rounds, those before `first` included."""
        return min(self.first + num_rounds * self.world.size * self.batch_size, self.num)

    def num_of_others(self, num_rounds: int) -> int:
        """Images that the other processes have made in so many rounds."""
        return self.num_done(num_rounds) - self.first - sum(map(len, self.own[:num_rounds]))

    def rounds(self, own: Iterable[T]) -> Iterator[T | None]:
        """What this process makes of its batches, then None if the last round has none for it."""
        num_batches = math.ceil((self.num - self.first) / self.batch_size)
        is_idle_at_last = 0 < num_batches % self.world.size <= self.world.rank
        return chain(own, [None] if is_idle_at_last else [])

    def gather(self, rows: np.ndarray | None) -> list[np.ndarray]:
        """On the first process, a round's rows (B, ...) of each batch, in order; elsewhere nothing.

        All processes have to call it in every round, with None if they have no batch in it.
        Raises Lost where one has ended.
        """
        if self.world.is_alone:
            return [] if rows is None else [rows]
        parts = self.world.gather(np.empty(0, np.uint8) if rows is None else rows)
        return [part for part in parts if len(part)]


class DrawingStops(JointStopRequests):
    """Stop requests while shares are made: whoever is asked, or fails, ends all.

    Each process ends as soon as it hears, not at one place: nothing has to be saved jointly, and a
    round may take longer than a batch system waits.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._listened_at = 0.0

    def go_on(self, message: str) -> None:
        """Raises Stopped with `message` if this process was asked to stop, Lost if one has ended.

        Lost ends this process with the exit code of the other, which has said why.
        """
        if self.asked:
            raise self.stopped(message)
        now = time.monotonic()
        if now - self._listened_at > _LISTEN_SECONDS:
            self._listened_at = now
            if self._world.failure():
                raise Lost("another process of this launch ended")
