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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
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


@contextmanager
def signals_end_the_command() -> Iterator[None]:
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


_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def file_lock(path: Path) -> BaseFileLock:
    """A lock on the file at `path`: the system's, which goes with the process that holds it.

    Where the file system has none (some NFS, FUSE and parallel ones) the file notes its holder,
    who is known to be gone on the same host alone; `holder_of` then says what to remove.
    """
    from filelock import FileLock, SoftFileLock

    kind = FileLock if _has_flock(path.parent) else SoftFileLock
    return kind(path, thread_local=False)


def _has_flock(folder: Path) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return False
            raise
    return True


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
    from filelock import Timeout

    path = Path(path)
    lock_path = path.parent / f".{path.name}.lock"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = file_lock(lock_path)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
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


class JobFailed(DemeError):
    """A process of `--range all` ended with an error; carries its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class RangeProcess:
    """One range: its command line (after `deme`), and the curves that tell how far it is."""

    label: str
    arguments: Sequence[str]
    metrics: Sequence[Path]

    @property
    def step(self) -> int:
        """Updates done, as far as its metrics files tell."""
        return sum(last_step(path) for path in self.metrics)


@dataclass(frozen=True)
class _Running:
    """A range whose process was started; `said` is what it tells people, in a file: a pipe that
    nobody empties would stop it."""

    job: RangeProcess
    process: subprocess.Popen[bytes]
    said: IO[bytes]


def run_jobs(jobs: Sequence[RangeProcess], *, at_once: int) -> Iterator[dict[str, int]]:
    """Run all jobs, at most `at_once` at a time; yields updates done per label now and then.

    Raises JobFailed with the first failing process's message (the others are asked to stop and
    save), Stopped after a signal, once every process has saved its state.
    """
    num_threads = max(1, (os.cpu_count() or 1) // at_once)
    waiting, running = list(jobs), list[_Running]()
    with StopRequests() as requests:
        while waiting or running:
            while waiting and len(running) < at_once and not requests.asked:
                running.append(_start(waiting.pop(0), num_threads))
            time.sleep(_POLL_SECONDS)
            yield {job.label: job.step for job in jobs if job not in waiting}
            if requests.asked:
                _stop(running)
                raise requests.stopped("all ranges saved; run the same command again to continue")
            for ended in [one for one in running if one.process.poll() is not None]:
                running.remove(ended)
                ended.said.seek(0)
                said = ended.said.read()
                if code := ended.process.returncode:
                    _stop(running)
                    message = f"range {ended.job.label}: {reason_of(code, said)}"
                    raise JobFailed(message, code if code > 0 else 1)
                for line in said.decode(errors="replace").splitlines():
                    if not _PROGRESS.search(line):
                        console.note_once(line)  # most notes are those of every range


def last_step(metrics: Path) -> int:
    """The update of the last record in a metrics file; 0 where there is none yet."""
    try:
        lines = metrics.read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, json.JSONDecodeError):  # not written yet, or a line half written
        return 0


def _start(job: RangeProcess, num_threads: int) -> _Running:
    said = tempfile.TemporaryFile()  # noqa: SIM115  read when the process ends; it has no name
    return _Running(job, start_deme(job.arguments, num_threads=num_threads, errors=said), said)


def _stop(running: Sequence[_Running]) -> None:
    """Ask the processes to save and stop, and wait for them."""
    for one in running:
        if one.process.poll() is None:
            one.process.terminate()
    for one in running:
        one.process.wait()
