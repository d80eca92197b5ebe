"""Stopping all processes of a launch at the same place, when one of them is asked to stop."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from deme_cli.interrupts import StopRequests
from deme_cli.processes import World

_SAME_SIGNAL_SECONDS = 10.0  # a launcher passes on what its processes may have got themselves


class JointStopRequests(StopRequests):
    """Stop requests of all processes: one that is asked to stop stops all, at the same place.

    Of several processes, signals that come again soon are the launcher's echo of the first.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world, self._agreed, self._first_at = world, 0, 0.0

    def exchange(self) -> None:
        """Tell the others whether this process was asked, and hear of them."""
        self._agreed = self._world.largest(int(self.asked or 0))

    @property
    def is_agreed(self) -> bool:
        """Whether to stop: as of the last exchange; alone, as of now."""
        if self._world.is_alone:
            return self.asked is not None
        if self._agreed:
            self.asked = signal.Signals(self._agreed)
        return self._agreed > 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._world.is_alone:
            super()._ask(number, frame)
            return
        if self.asked is None:
            self.asked, self._first_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._first_at > _SAME_SIGNAL_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)
