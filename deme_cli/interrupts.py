"""Stopping politely: a signal asks, the procedure saves its state at a safe point and stops.

Where no procedure listens (imports, a model being loaded), a signal ends the command at once, but
with the same exit code and a line. The signal after it kills.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from deme_cli.errors import Stopped

if TYPE_CHECKING:
    from typing import Self

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
if hasattr(signal, "SIGUSR1"):
    _EXIT_CODES[signal.SIGUSR1] = 75  # what batch systems send before the time limit
    _EXIT_CODES[signal.SIGHUP] = 75  # the terminal was closed

_unheard: signal.Signals | None = None  # came while no procedure listened


class _Asked(BaseException):
    """A signal came. No library takes it for a failure of its own, as it would an Exception."""


@contextmanager
def stops_told() -> Iterator[None]:
    """While entered, a signal that no `StopRequests` hears raises Stopped, exit code 75 or 130.

    Only Python's own handlers are replaced: what is ignored stays so, as SIGHUP under nohup.
    """
    global _unheard
    before = {name: signal.getsignal(name) for name in _EXIT_CODES}
    usual = (signal.SIG_DFL, signal.default_int_handler)
    heard = [name for name, handler in before.items() if handler in usual]
    try:
        for name in heard:
            signal.signal(name, _leave)
        yield
    except (_Asked, KeyboardInterrupt) as error:
        asked = _unheard or signal.SIGINT
        raise Stopped(
            f"stopped by {asked.name}; run the same command again: it goes on from what was kept, "
            f"if anything was",
            exit_code=_EXIT_CODES[asked],
        ) from error
    finally:
        _unheard = None
        for name in heard:
            signal.signal(name, before[name])


def _leave(number: int, frame: FrameType | None) -> None:
    global _unheard
    _unheard = signal.Signals(number)
    _let_the_next_kill()
    raise _Asked


def _let_the_next_kill() -> None:
    for name in _EXIT_CODES:
        if signal.getsignal(name) is _leave:
            is_ctrl_c = name == signal.SIGINT
            signal.signal(name, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)


class StopRequests:
    """While entered, SIGINT, SIGTERM, SIGUSR1 and SIGHUP set `asked` instead of killing.

    A second signal of the same run falls through to the handler before, for those in a hurry.
    Outside the main thread (a notebook, a test) signals stay as they are.
    """

    def __init__(self) -> None:
        self.asked = _unheard  # one whose exception got lost, as in torch's import of numpy
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
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
            signal.signal(name, handler)
        self._before = {}
        if self.asked is not None:
            _let_the_next_kill()

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
