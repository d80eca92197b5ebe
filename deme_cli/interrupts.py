"""Stopping politely: a signal asks, the procedure saves its state at a safe point and stops."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from deme_cli.errors import Stopped

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
if hasattr(signal, "SIGUSR1"):
    _EXIT_CODES[signal.SIGUSR1] = 75  # what batch systems send before the time limit
    _EXIT_CODES[signal.SIGHUP] = 75  # the terminal was closed


class StopRequests:
    """While entered, SIGINT, SIGTERM, SIGUSR1 and SIGHUP set `asked` instead of killing.

    A second signal of the same run falls through to the handler before, for those in a hurry.
    Outside the main thread (a notebook, a test) signals stay as they are.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for name in _EXIT_CODES:
                if name.name == "SIGHUP" and signal.getsignal(name) == signal.SIG_IGN:
                    continue  # nohup: the run is to outlive its terminal
                self._before[name] = signal.signal(name, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]
        self._before = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._restore()

    def stopped(self, message: str) -> Stopped:
        """The error to raise once the state is saved; `message` says how to go on."""
        assert self.asked is not None
        return Stopped(message, exit_code=_EXIT_CODES[self.asked])
