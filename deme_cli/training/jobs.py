"""Several experts side by side: one process per range, watched through their metrics files.

Ranges are independent, so they run as processes of the same command line, the processor's cores
divided among them. Who watches passes signals on; each process saves its own state.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deme_cli import console
from deme_cli.errors import DemeError
from deme_cli.jobs import StopRequests, reason_of, start_deme

_POLL_SECONDS = 0.5
_PROGRESS = re.compile(r": [\d,]+/[\d,]+ ")


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
