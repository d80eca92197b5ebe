"""What a process owes the others of its machine: it stops politely, claims what it writes, and
watches the `deme` processes that it starts.

A signal asks; the procedure saves its state at a safe point and stops. Where no procedure listens
(imports, a model being loaded), a signal ends the command at once, but with the same exit code and
a line. The signal after it kills.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.errors import ConfigError, DemeError, Stopped, writing

if TYPE_CHECKING:
    from typing import Self

    from filelock import BaseFileLock

_POLL_SECONDS = 0.5
_PROGRESS = re.compile(r": [\d,]+/[\d,]+ ")
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
if hasattr(signal, "SIGUSR1"):
    _EXIT_CODES[signal.SIGUSR1] = 75  # what batch systems send before the time limit
    _EXIT_CODES[signal.SIGHUP] = 75  # the terminal was closed

_unheard: signal.Signals | None = None  # came while no procedure listened


class _Asked(BaseException):
    """A signal came. No library takes it for a failure of its own, as it would an Exception."""


class StopRequests:
    """While entered, SIGINT, SIGTERM, SIGUSR1 and SIGHUP set `asked` instead of killing.

    The next signal finds the handlers of before, or kills, for those in a hurry. Outside the main
    thread (a notebook, a test) signals stay as they are.
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
            if self.asked and isinstance(getattr(handler, "__self__", None), _Unheard):
                handler = signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL
            signal.signal(name, handler)
        self._before = {}

    def __exit__(self, *error: object) -> None:
        self._restore()

    def stopped(self, message: str) -> Stopped:
        """The error to raise once the state is saved; `message` says how to go on."""
        assert self.asked is not None
        return Stopped(message, exit_code=_EXIT_CODES[self.asked])


class _Unheard(StopRequests):
    """Requests that no procedure hears: they end the command where it stands."""

    def _ask(self, number: int, frame: FrameType | None) -> None:
        global _unheard
        super()._ask(number, frame)
        _unheard = self.asked
        raise _Asked


@contextmanager
def signals_end_the_command() -> Iterator[None]:
    """While entered, a signal that no `StopRequests` hears raises Stopped, exit code 75 or 130."""
    global _unheard
    requests = _Unheard()
    try:
        with requests:
            yield
    except (_Asked, KeyboardInterrupt) as error:
        requests.asked = requests.asked or signal.SIGINT
        raise requests.stopped(
            f"stopped by {requests.asked.name}; run the same command again: it goes on from what "
            f"was kept, if anything was"
        ) from error
    finally:
        _unheard = None


_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def file_lock(path: Path) -> BaseFileLock:
    """A lock on the file at `path`: the system's, which goes with the process that holds it.

    Where the file system has none (some NFS, FUSE and parallel ones) the file notes its holder,
    who is known to be gone on the same host alone; `holder_of` then says what to remove.
    """
    from filelock import FileLock, SoftFileLock

    if sys.platform != "win32":
        import fcntl

        with tempfile.TemporaryFile(dir=path.parent) as probe:
            try:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_FLOCK:
                    return SoftFileLock(path, thread_local=False)
                raise
    return FileLock(path, thread_local=False)


def holder_of(path: Path) -> str:
    """The process that a lock's file names, and what helps if that is gone; "" if it names none."""
    with suppress(OSError, ValueError):
        match path.read_text().split():
            case [process, host, *_]:
                return f" (process {process} on {host}; if that is gone, remove {path})"
    return ""


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold the right to write `path`. Raises ConfigError while another process holds it."""
    lock_path = path.parent / f".{path.name}.lock"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = file_lock(lock_path)
        try:
            lock.acquire(timeout=0)
        except TimeoutError as error:
            raise ConfigError(
                f"{path} is being written by another deme process{holder_of(lock_path)}; wait for "
                f"it or use --output"
            ) from error
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        lock.release()


def start_deme(
    words: Sequence[str], *, num_threads: int, errors: int | IO[bytes], folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start `deme` with these words in `folder`; what it says goes to `errors`, results nowhere.

    Its threads wait passively unless the environment says otherwise: spinning ones take the core
    from the process next to it. It runs alone, whatever launch this process is of.
    """
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    environment |= {"OMP_NUM_THREADS": str(num_threads), "WORLD_SIZE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "deme_cli", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,  # Ctrl-C comes to the one who watches, and is passed on once
    )


def reason_of(code: int, said: bytes) -> str:
    """Why a process failed: the last line of what it said, or the signal that killed it."""
    lines = said.decode(errors="replace").strip().splitlines()
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return lines[-1].removeprefix("deme: ") if lines else "no message"


def last_step(metrics: Path) -> int:
    """The update of the last record in a metrics file; 0 where there is none yet."""
    try:
        lines = metrics.read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, json.JSONDecodeError):  # not written yet, or a line half written
        return 0


@dataclass(frozen=True)
class RangeProcess:
    """One range: its command line (after `deme`), and the curves that tell how far it is."""

    label: str
    arguments: Sequence[str]
    metrics: Sequence[Path]


def run_jobs(jobs: Sequence[RangeProcess], *, at_once: int) -> Iterator[dict[str, int]]:
    """Run all jobs, at most `at_once` at a time; yields updates done per label now and then.

    Raises DemeError with the message and the exit code of the first that fails (the others are
    asked to stop and save), Stopped after a signal, once every process has saved its state.
    """
    num_threads = max(1, (os.cpu_count() or 1) // at_once)
    waiting = list(jobs)
    # What a process tells people goes to a file: a pipe that nobody empties would stop it.
    running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    with StopRequests() as requests:
        while waiting or running:
            while waiting and len(running) < at_once and not requests.asked:
                job = waiting.pop(0)
                errors = tempfile.TemporaryFile()  # noqa: SIM115  read when the process ends
                process = start_deme(job.arguments, num_threads=num_threads, errors=errors)
                running[job.label] = process, errors
            time.sleep(_POLL_SECONDS)
            begun = [job for job in jobs if job not in waiting]
            yield {job.label: sum(map(last_step, job.metrics)) for job in begun}
            if requests.asked:
                _stop(running)
                raise requests.stopped("all ranges saved; run the same command again to continue")
            for label, (process, said) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[label]
                said.seek(0)
                told = said.read()
                if code := process.returncode:
                    _stop(running)
                    message = f"range {label}: {reason_of(code, told)}"
                    raise DemeError(message, exit_code=max(code, 1))
                for line in told.decode(errors="replace").splitlines():
                    if not _PROGRESS.search(line):
                        console.note_once(line)  # most notes are those of every range


def _stop(running: Mapping[str, tuple[subprocess.Popen[bytes], IO[bytes]]]) -> None:
    """Ask the processes to save and stop, and wait for them."""
    for process, _ in running.values():
        if process.poll() is None:
            process.terminate()
    for process, _ in running.values():
        process.wait()
