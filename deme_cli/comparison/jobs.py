"""What does the jobs of a comparison: any number of processes that see its folder.

A job is done once its files lie in its folder, each written whole; nothing else is kept. Each runs
in a process of its own, which holds the lock of the folder as long as it lives, whatever becomes of
the one that started it, and calls the verbs, each of which goes on where it was stopped. No torch
before a job is known to be free.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deme_cli.console import SCHEMA_VERSION, Progress, Step, silent
from deme_cli.errors import ConfigError, Stopped
from deme_cli.files import write_whole
from deme_cli.jobs import StopRequests, claim, last_step, reason_of, start_deme
from deme_cli.run_file import RunFile
from deme_cli.training.setup import metrics_path

JOB_NAME, FAILED_NAME, LOG_NAME = "job.json", "failed.json", "log.txt"
MERGED_NAME = "merged.safetensors"
_LEFT = (75, 130)  # exit codes of a job that goes on another time
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Failure:
    """Why a job has no result, and the exit code of its process."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Job:
    """What happens in a folder of its own, once the job that it `needs` is done.

    task: what `do_job` does there.   outputs: the files that make it done.   updates: of training.
    """

    folder: Path
    title: str
    task: Mapping[str, Any]
    outputs: Sequence[str]
    needs: Job | None = None
    updates: int = 0

    @property
    def is_done(self) -> bool:
        return all((self.folder / name).exists() for name in self.outputs)

    @property
    def failure(self) -> Failure | None:
        """How the last try failed, in whatever process; None if it did not."""
        if self.is_done:
            return None
        try:
            return Failure(**json.loads((self.folder / FAILED_NAME).read_text()))
        except (OSError, ValueError, TypeError):  # not there, or being tried again
            return self.needs.failure if self.needs else None

    @property
    def curves(self) -> list[Path]:
        return [metrics_path(self.folder / name) for name in self.outputs]


def do_job(folder: Path, progress: Progress = silent) -> None:
    """Do what is not done yet of the job in `folder`, as its job.json says.

    Raises Stopped where another process does it, else what the verbs raise.
    """
    with contextlib.chdir(folder), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(claim(Path("job")))
        except ConfigError as error:
            raise Stopped(str(error), exit_code=_LEFT[0]) from error
        from deme_cli.evaluation.evaluate import evaluate
        from deme_cli.merging.merge import merge
        from deme_cli.training.finetune import finetune

        task = json.loads(Path(JOB_NAME).read_text(encoding="utf-8"))
        run = RunFile(tables=task["tables"])
        where = {"device": task["device"], "dtype": task["dtype"], "progress": progress}
        if "models" not in task:
            finetune("all", run=run, **where)
            return
        models = list(map(Path, task["models"]))
        if "merge" in task["tables"]:
            if not Path(MERGED_NAME).exists():
                merge(models, run=run, **where)
            models = [Path(MERGED_NAME)]
        for index, measure in enumerate(task["measures"]):
            output = Path(f"measure-{index}.json")
            if not output.exists():
                own = {name: measure[name] for name in ("sample", "eval")}
                of_measure = RunFile(tables={**task["tables"], **own})
                measured = evaluate(models, run=of_measure, **where)
                assert measured is not None, "this process is alone"
                document = {"schema_version": SCHEMA_VERSION, **measured.document}
                write_whole(output, [json.dumps(document, indent=2).encode()])


def work_off(jobs: Sequence[Job], at_once: int, progress: Progress) -> None:
    """Do what is free until nothing is, `at_once` at a time; what other processes do is left to
    them. A job that fails fails alone, with those that need it.

    Raises Stopped after a signal, once every job here has saved its state.
    """
    waiting, total = {job.folder: job for job in jobs}, len({job.folder for job in jobs})
    running: dict[Path, tuple[Job, subprocess.Popen[bytes], float]] = {}
    with StopRequests() as requests:
        try:
            while not requests.asked:
                for job, process, start in list(running.values()):
                    if process.poll() is not None:
                        del running[job.folder]
                        note = f"{_outcome(job, process)}, {time.monotonic() - start:.0f} s"
                        progress(Step(note=f"{job.title}: {note}"))
                waiting = {folder: job for folder, job in waiting.items() if not job.is_done}
                ready = [job for job in waiting.values() if not job.needs or job.needs.is_done]
                for job in ready[: at_once - len(running)]:
                    running[job.folder] = (job, _start(job, at_once), time.monotonic())
                    del waiting[job.folder]
                settled = total - len(waiting) - len(running)
                at_work = [job for job, _, _ in running.values()]
                done = sum(last_step(curve) for job in at_work for curve in job.curves)
                updates = sum(job.updates for job in at_work)
                detail = f"{len(at_work)} running" + f", {done}/{updates} updates" * bool(updates)
                progress(Step(settled, total, "comparison", "job", detail=detail))
                if not running:
                    return
                time.sleep(_POLL_SECONDS)
            raise requests.stopped(
                "stopped, every job saved; run the same command again to continue"
            )
        finally:
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                process.wait()


def _start(job: Job, at_once: int) -> subprocess.Popen[bytes]:
    """A process that does the job, if no other has it; what it says is added to the log."""
    (job.folder / FAILED_NAME).unlink(missing_ok=True)
    write_whole(job.folder / JOB_NAME, [json.dumps(job.task, indent=1).encode()])
    with (job.folder / LOG_NAME).open("ab") as log:
        return start_deme(
            ["compare", ".", "--quiet"], num_threads=max(1, (os.cpu_count() or 1) // at_once),
            errors=log, folder=job.folder,
        )  # fmt: skip


def _outcome(job: Job, process: subprocess.Popen[bytes]) -> str:
    """What became of a job, in words; a failure is noted in its folder."""
    code, log = process.returncode, job.folder / LOG_NAME
    if code == 0:
        return "done"
    message = reason_of(code, log.read_bytes())
    if code in _LEFT:
        return f"left for now: {message}"
    failure = Failure(f"{message} (see {log})" if code < 0 else message, code if code > 0 else 1)
    write_whole(job.folder / FAILED_NAME, [json.dumps(asdict(failure)).encode()])
    return f"FAILED: {failure.message}"
