"""Signals that come before the work begins: a line and the exit code of the contract."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deme_cli.errors import Stopped
from deme_cli.jobs import StopRequests, signals_end_the_command

ROOT = Path(__file__).parents[1]
NAMES = ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"]
# The command is asked to stop while it imports torch; `then` runs as it unwinds.
ASKED = """
import os, signal, sys
from deme_cli.__main__ import main

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.{name})
            finally:
                {then}

signal.signal(signal.{name}, signal.{handler})
sys.meta_path.insert(0, Finder())
sys.argv = ["deme", "sample", "digits", "-n", "1", "--steps", "1", "-o", "out.safetensors"]
main()
"""
DEFAULT = {"SIGINT": "default_int_handler"}


def ask(folder: Path, name: str, *, then: str = "pass", handler: str = "") -> tuple[int, str]:
    """The exit code of a command that gets a signal during its imports, and what it said."""
    code = ASKED.format(name=name, then=then, handler=handler or DEFAULT.get(name, "SIG_DFL"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Python's own handlers, also where pytest runs under nohup or in the background."""
    usual = dict.fromkeys(NAMES, signal.SIG_DFL) | {"SIGINT": signal.default_int_handler}
    before = {name: signal.signal(getattr(signal, name), usual[name]) for name in NAMES}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_during_the_imports_is_one_line_and_its_exit_code(
    tmp_path: Path, name: str
) -> None:
    code, said = ask(tmp_path, name)
    assert code == (130 if name == "SIGINT" else 75)
    assert said.startswith(f"deme: stopped by {name}; run the same command again")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_second_signal_kills(tmp_path: Path) -> None:
    again = "os.kill(os.getpid(), signal.SIGTERM)"
    assert ask(tmp_path, "SIGTERM", then=again) == (-signal.SIGTERM, "")


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    code, said = ask(tmp_path, "SIGHUP", then="sys.exit(7)", handler="SIG_IGN")
    assert (code, said) == (7, "")


def test_a_signal_whose_exception_is_lost_stops_the_work_that_follows() -> None:
    with signals_end_the_command():
        with contextlib.suppress(BaseException):  # as torch's own import of numpy does
            signal.raise_signal(signal.SIGTERM)
        with StopRequests() as stop:
            assert stop.asked == signal.SIGTERM
            assert stop.stopped("kept").exit_code == 75
    assert StopRequests().asked is None


@pytest.mark.parametrize("name", NAMES)
def test_after_a_stop_request_the_next_signal_kills(name: str) -> None:
    number = getattr(signal, name)
    with signals_end_the_command():
        with StopRequests() as stop:
            signal.raise_signal(number)
            assert stop.asked == number
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_work_that_was_not_asked_to_stop_leaves_the_handlers_as_they_were() -> None:
    def work() -> None:
        with signals_end_the_command():
            with StopRequests() as stop:
                pass
            assert stop.asked is None
            signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(Stopped, match="stopped by SIGUSR1"):
        work()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
