"""Work off the jobs of a comparison, several at a time, on every machine that sees the folder.

A job belongs to the process that holds its lock; another process passes it by and takes the next
free one. What a job does is `deme` command lines, each of which resumes by itself, so a job that
was stopped goes on where it was. A job that fails fails alone, with those that need it. No torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from deme_cli.comparison.jobs import (
    DONE_NAME,
    FAILED_NAME,
    SETTINGS_NAME,
    Command,
    Failure,
    Job,
    RowJobs,
    slug,
)
from deme_cli.console import Progress, Step
from deme_cli.errors import ConfigError
from deme_cli.files import write_whole
from deme_cli.jobs import StopRequests, claim, last_step, reason_of, start_deme

_POLL_SECONDS = 0.2
_SHOWN = 3  # settings that are named where a row has changed
LOG_NAME = "log.txt"


@dataclass(frozen=True)
class Finished:
    """A job that ended just now, well or with a failure."""

    job: Job
    seconds: float
    failure: Failure | None = None


@dataclass(frozen=True)
class Pulse:
    """How far the work is: jobs that are settled, updates done of each that runs here, and how
    many updates these have in all."""

    settled: int
    running: Mapping[str, int]
    updates: int


@dataclass
class _Process:
    """A job under way: its next command, the process of it, and its lock."""

    job: Job
    lock: ExitStack
    waiting: list[Command]
    start: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None

    def begin_next(self, num_threads: int) -> None:
        """Start the next command that has no output yet."""
        command = self.waiting.pop(0)
        self.log = (self.job.folder / LOG_NAME).open("wb")
        self.process = start_deme(
            command.words, num_threads=num_threads, errors=self.log, folder=self.job.folder
        )

    def failure(self, code: int) -> Failure:
        """Why the command failed, and where it said more."""
        log = self.job.folder / LOG_NAME
        message = reason_of(code, log.read_bytes())
        return Failure(f"{message} (see {log})" if code < 0 else message, code if code > 0 else 1)


class Work:
    """The jobs of a comparison, and which of them failed; `failures` is by folder."""

    def __init__(self, jobs: Sequence[Job], *, at_once: int) -> None:
        self.jobs = list({job.folder: job for job in jobs}.values())
        self.at_once = at_once
        self.failures: dict[Path, Failure] = {}
        self._running: list[_Process] = []
        self._threads = max(1, (os.cpu_count() or 1) // at_once)

    def run(self) -> Iterator[Finished | Pulse]:
        """Run what is free until nothing is; what other processes hold is left to them.

        Raises Stopped after a signal, once every command here has saved its state.
        """
        with StopRequests() as requests:
            try:
                while True:
                    yield from self._settle()
                    free = [] if requests.asked else self._free()
                    while free and len(self._running) < self.at_once:
                        self._begin(free.pop(0))
                    if requests.asked:
                        raise requests.stopped(
                            "stopped, every job saved; run the same command again to continue"
                        )
                    if not self._running:
                        return
                    updates = sum(one.job.updates for one in self._running)
                    yield Pulse(self.num_settled, self._updates(), updates)
                    time.sleep(_POLL_SECONDS)
            finally:
                self._stop()

    @property
    def num_settled(self) -> int:
        """Jobs that are done or have failed, wherever they ran."""
        return sum(job.is_done or job.folder in self.failures for job in self.jobs)

    def _updates(self) -> dict[str, int]:
        return {
            one.job.title: sum(last_step(curve) for curve in one.job.curves)
            for one in self._running
        }

    def _free(self) -> list[Job]:
        """Jobs that could run now; those whose needs failed are settled with that failure."""
        here, free = {one.job.folder for one in self._running}, []
        known = {job.folder: job for job in self.jobs}
        for job in self.jobs:
            if job.is_done or job.folder in self.failures or job.folder in here:
                continue
            failed = [need for need in job.needs if need in self.failures]
            if failed:
                self.failures[job.folder] = self.failures[failed[0]]
            elif all(known[need].is_done for need in job.needs):
                free.append(job)
        return free

    def _begin(self, job: Job) -> None:
        """Take a job, if no other process has it, and start its first command."""
        lock = ExitStack()
        try:
            lock.enter_context(claim(job.folder / "job"))
        except ConfigError:  # another process has it
            return
        if job.is_done:  # it was finished elsewhere while we looked
            lock.close()
            return
        (job.folder / FAILED_NAME).unlink(missing_ok=True)
        for name, text in job.files.items():
            write_whole(job.folder / name, [text.encode()])
        waiting = [one for one in job.commands if not (job.folder / one.output).exists()]
        one = _Process(job, lock, waiting)
        self._running.append(one)
        if waiting:
            one.begin_next(self._threads)

    def _settle(self) -> Iterator[Finished]:
        """Go on with the jobs whose command has ended."""
        for one in list(self._running):
            if one.process is not None and one.process.poll() is None:
                continue
            if one.log:
                one.log.close()
            code = one.process.returncode if one.process else 0
            if code == 0 and one.waiting:
                one.begin_next(self._threads)
                continue
            seconds = time.monotonic() - one.start
            failure = None if code == 0 else one.failure(code)
            if failure is None:
                self._write(one.job, DONE_NAME, {"seconds": seconds})
            else:
                self.failures[one.job.folder] = failure
                self._write(one.job, FAILED_NAME, asdict(failure))
            one.lock.close()
            self._running.remove(one)
            yield Finished(one.job, seconds, failure)

    def _write(self, job: Job, name: str, values: dict[str, Any]) -> None:
        write_whole(job.folder / name, [json.dumps(values).encode()])

    def _stop(self) -> None:
        """Ask what still runs to save and stop, and wait for it."""
        for one in self._running:
            if one.process and one.process.poll() is None:
                one.process.terminate()
        for one in self._running:
            if one.process:
                one.process.wait()
            if one.log:
                one.log.close()
            one.lock.close()
        self._running = []


def work_off(jobs: Sequence[Job], at_once: int, progress: Progress) -> None:
    """Run the jobs, telling how far they are and which have ended."""
    work = Work(jobs, at_once=at_once)
    total = len(work.jobs)
    for record in work.run():
        if isinstance(record, Finished):
            outcome = f"FAILED: {record.failure.message}" if record.failure else "done"
            note = f"{record.job.title}: {outcome}, {record.seconds:.0f} s"
            progress(Step(work.num_settled, total, "comparison", "job", note))
        else:
            trained = f", {sum(record.running.values())}/{record.updates} updates"
            detail = f"{len(record.running)} running{trained if record.updates else ''}"
            progress(Step(record.settled, total, "comparison", "job", detail=detail))
    progress(Step(work.num_settled, total, "comparison", "job"))


def change_of(jobs: RowJobs) -> str | None:
    """What differs from the settings of an earlier result of this row, which stays where it lies;
    None if nothing does or the row is finished."""
    missing = [job for job in jobs.results.values() if not job.is_done]
    if not missing:
        return None
    own, name = missing[0].folder.parent, jobs.row.name
    finished: list[tuple[float, Path, dict[str, Any]]] = []
    for done in own.parent.glob(f"{slug(name)}-????????/*/{DONE_NAME}"):
        with suppress(OSError, ValueError, KeyError):  # removed by hand, or of another version
            settings = json.loads(done.with_name(SETTINGS_NAME).read_text())
            if settings["row"] == name and done.parents[1] != own:
                trained = own.parents[1] / "trainings" / settings["training"]
                for path in sorted(trained.glob(f"*/{SETTINGS_NAME}"))[:1]:
                    settings |= json.loads(path.read_text())
                finished.append((done.stat().st_mtime, done.parents[1], _flat(settings)))
    if not finished:
        return None
    _, place, before = max(finished, key=lambda one: one[0])
    now: dict[str, Any] = {}
    for job in (missing[0], *jobs.trainings.values()):
        now |= _flat(json.loads(job.files[SETTINGS_NAME]))
    changed = [key for key in sorted({*now, *before}) if now.get(key) != before.get(key)]
    shown = [f"{key} {before.get(key)} -> {now.get(key)}" for key in changed[:_SHOWN]]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return (
        f"{name}: finished before with other settings ({', '.join(shown)}{more}); made anew, what "
        f"was measured then stays in {place}"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by name, those of a table as `table.name`; without what is no setting."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name == "measures":
            for one in value:
                own = {table: one[table] for table in ("sample", "eval")}
                flat |= _flat(own, f"{one['name']} " if one["name"] else "")
        elif isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif name not in ("training", "row"):
            flat[prefix + name] = value
    return flat
