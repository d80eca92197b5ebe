"""From a plan to jobs, and what does them: any number of processes that see the folder.

A training job makes the experts (or the one network) of some settings and one seed; rows with the
same settings share it. A result job merges, where its row asks for that, and measures. A folder's
name ends with a digest of everything that decides what will lie in it: a changed setting is another
folder, so what is finished stays true and only what changed is made anew. Nothing else is kept: a
job is done once its files lie there, each written whole. Each job runs in a process of its own,
which holds the lock of the folder as long as it lives, whatever becomes of the one that started it,
and calls the verbs, each of which goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deme_cli.artifacts import BaseRecord, read_record
from deme_cli.comparison.costs import flops_per_update, passes_of
from deme_cli.comparison.plan import COMMON, PLAIN, Plan, RowPlan, Tables, naming
from deme_cli.config import NOT_RESULT, TABLES, DataConfig, FinetuneConfig, MergeConfig
from deme_cli.console import SCHEMA_VERSION, Progress, Step, silent
from deme_cli.data.image_source import KNOWN_DATASETS, find_image_source
from deme_cli.data.prompts import KNOWN_PROMPTS
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ConfigError, Stopped
from deme_cli.files import shown_path, write_whole
from deme_cli.jobs import StopRequests, claim, last_step, reason_of, start_deme
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange
from deme_cli.training.clusters import Affinity, cluster_draws, read_affinity, split_times
from deme_cli.training.setup import affinity_path, metrics_path, require_companions
from deme_cli.training.weighting import Reduction

JOB_NAME, FAILED_NAME, LOG_NAME = "job.json", "failed.json", "log.txt"
MERGED_NAME = "merged.safetensors"
_LEFT = (75, 130)  # exit codes of a job that goes on another time
_POLL_SECONDS = 0.2
_LEFT_ALONE = {  # settings that do not decide a result, or have a place of their own
    "finetune": (*NOT_RESULT, "seed"),
    "merge": ("batch_size", "report", "report_num", "report_repeats", "report_seed"),
    "sample": ("batch_size", "num", "seed"),  # the last two are those of [eval]
    "eval": ("batch_size", "mixed"),
}
_OF_ROWS = (  # settings of [finetune] that are what rows differ in, or follow from the plan
    "loss_weighting", "weighting_gamma", "weighting_k", "normalise_weighting", "multitask",
    "clusters", "cluster_by", "multitask_lr", "multitask_every", "seed", "snapshot_every",
    "ema_lengths",
)  # fmt: skip
_PLACES = ("source", "pipeline", "cache", "prompts", "fid", "kid", "features", "clip_weights")
_NAMES = {*KNOWN_DATASETS, *KNOWN_PROMPTS, "digits", "auto", "off", "inception", "clip"}


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


@dataclass(frozen=True)
class Stage:
    """What all jobs of a comparison share: where it lies, what it starts from, the common tables.

    measures: name, whole [sample] and [eval] of each.   ranges: the divisions that rows ask for, by
    (by, n).   updates: in total, by row.   The device does not decide a result, all else does.
    """

    plan: Plan
    folder: Path
    base: Path
    record: BaseRecord
    tables: Tables
    measures: Sequence[Mapping[str, Any]]
    ranges: Mapping[tuple[str, int], Sequence[TimestepRange]]
    updates: Mapping[str, int]
    device: str = "auto"
    dtype: str = "fp32"

    def finetune(self, row: RowPlan) -> FinetuneConfig:
        """Every setting of a row's training: the common ones, those of its kind, its own."""
        updates = self.updates[row.name]
        plain = PLAIN if row.kind == "finetune" else {}
        with naming(f"row {row.name!r}"):
            if updates < row.n:
                raise ConfigError(f"{row.n} ranges cannot share {updates} updates")
            given = {**self.tables["finetune"], **plain, **row.finetune}
            return FinetuneConfig(**{**given, "steps": updates // row.n})

    def merge(self, row: RowPlan) -> MergeConfig:
        """Every setting of a row's merge."""
        with naming(f"row {row.name!r}: [merge]"):
            config = MergeConfig(**{**self.tables["merge"], **row.merge, "report": False})
            if config.coefficients is not None and len(config.coefficients) != row.n:
                given = config.coefficients
                raise ConfigError(f"coefficients = {given}: expected {row.n}, one a range")
        return config

    def flops(self, row: RowPlan) -> float:
        """Floating-point operations of one update of a row; 0 where it does not train."""
        if row.kind == "base":
            return 0.0
        config = self.finetune(row)
        return flops_per_update(config, passes_of(self, config.projection))


def open_stage(
    plan: Plan, run: RunFile, folder: Path, *, base: Path, device: str = "auto", dtype: str = "fp32"
) -> Stage:
    """The stage of `plan` in `folder`, every row's settings checked before anything runs.

    Raises MissingError where there is no base or no gradients for a row to be divided by,
    ConfigError on settings.
    """
    record, tables = read_record(base, "base"), common_tables(plan, run)
    if not tables["data"].get("source"):
        raise ConfigError("no training images: set [data] source in deme.toml, or use --data")
    find_image_source(tables["data"]["source"])
    require_companions(record, tables["model"].get("pipeline"))
    schedule = read_schedule(record.scheduler_config)
    ranges = {
        (by, n): split_times(n, by, schedule, _affinity(base, record) if by == "gradient" else None)
        for by, n in {("uniform", 1)} | {(row.by, row.n) for row in plan.rows}
    }
    total = plan.updates or plan.n * FinetuneConfig(**tables["finetune"]).steps
    stage = Stage(
        plan, folder.resolve(), base.resolve(), record, tables, _measures(plan, run, tables),
        ranges, {row.name: total for row in plan.rows}, device, dtype,
    )  # fmt: skip
    for row in plan.rows:
        _check_row(row, stage)
    if plan.budget == "updates":
        return stage
    plain = RowPlan(plan.rows[0].name, "finetune")
    budget = total * stage.flops(plain)
    equal = {row.name: max(1, round(budget / (stage.flops(row) or budget))) for row in plan.rows}
    return replace(stage, updates=equal)


def common_tables(plan: Plan, run: RunFile) -> dict[str, dict[str, Any]]:
    """The settings that hold for every row, each table checked, the places in them absolute.

    What rows differ in is not taken from `deme.toml`, or plain finetuning would not be plain.
    """
    tables = {}
    for name in COMMON:
        given = {**run.tables.get(name, {})}
        if name == "finetune":
            given = {key: value for key, value in given.items() if key not in _OF_ROWS}
        tables[name] = _anchored({**given, **plan.tables.get(name, {})}, run)
        run.settings(TABLES[name], **tables[name])
    return tables


def _anchored(given: Mapping[str, Any], run: RunFile) -> dict[str, Any]:
    """Settings with the places in them absolute, for jobs that run in folders of their own.

    A known name stays one, though a folder of that name may lie here.
    """
    anchored = dict(given)
    for key in set(_PLACES) & set(given):
        if given[key] and given[key] not in _NAMES:
            path = Path(run.seen(given[key])).expanduser()
            anchored[key] = str(path.resolve()) if path.exists() else given[key]
    return anchored


def _measures(plan: Plan, run: RunFile, tables: Tables) -> list[dict[str, Any]]:
    """Where a plan has several, each names its own reference: other prompts have another."""
    common = {name: dict(tables[name]) for name in ("sample", "eval")}
    if len(plan.measures) > 1:
        common["eval"] = {k: v for k, v in common["eval"].items() if k not in ("fid", "kid")}
    measures = []
    for one in plan.measures:
        with naming(f"measure {one.name!r}"):
            own = {"sample": _anchored(one.sample, run), "eval": _anchored(one.eval, run)}
            whole = {t: _whole(TABLES[t](**{**common[t], **own[t]})) for t in own}
            measures.append({"name": one.name, **whole})
    return measures


def _whole(settings: Any) -> dict[str, Any]:
    """Every setting that is set."""
    return {name: value for name, value in asdict(settings).items() if value is not None}


def _check_row(row: RowPlan, stage: Stage) -> None:
    """Check a row's settings, and that this base has what they ask for."""
    if row.kind == "merged":
        stage.merge(row)
    if row.kind == "base":
        return
    config, record = stage.finetune(row), stage.record
    schedule = read_schedule(record.scheduler_config)
    with naming(f"row {row.name!r}"):
        Reduction(config, schedule)
        for span in stage.ranges[row.by, row.n] if config.multitask != "none" else ():
            if config.p > 0 and len(span) < record.num_train_timesteps:
                raise ConfigError(f"clusters divide each range, and p = {config.p} draws outside")
            gradients = _affinity(stage.base, record) if config.cluster_by == "gradient" else None
            draws = schedule.indices(span)
            cluster_draws(draws, config.clusters, config.cluster_by, schedule, gradients)


def _affinity(base: Path, record: BaseRecord) -> Affinity:
    """The gradients beside the base; the message where they are missing makes them there."""
    path = affinity_path(base)
    command = f"deme analyze gradients {shown_path(base)} -o {shown_path(path)}"
    return read_affinity(path, record.fingerprint, command=command)


def jobs_of(stage: Stage) -> dict[str, dict[int | None, Job]]:
    """By row and training seed (None where nothing is trained) the job that ends in a result."""
    return {
        row.name: {None: _result_job(row, stage)} if row.kind == "base" else {
            seed: _result_job(row, stage, _training_job(row, stage, seed), seed)
            for seed in stage.plan.seeds
        }
        for row in stage.plan.rows
    }  # fmt: skip


def _training_job(row: RowPlan, stage: Stage, seed: int) -> Job:
    """The experts of a row, or its one network."""
    config = stage.finetune(row)
    ranges = list(map(str, stage.ranges[row.by, row.n]))
    tables = {
        "split": {"n": row.n, "by": row.by, "ranges": ranges}, "finetune": _whole(config),
        "data": _whole(DataConfig(**stage.tables["data"])),
    }  # fmt: skip
    more = {}
    if config.multitask != "none" and config.cluster_by == "gradient":
        more["affinity"] = hashlib.sha256(affinity_path(stage.base).read_bytes()).hexdigest()
    name = f"{row.n}x{config.steps}-{_digest(tables, stage, **more)}"
    folder = stage.folder / "trainings" / name / f"seed-{seed}"
    tables["finetune"]["seed"] = seed
    return Job(
        folder, f"{row.n} x {config.steps} updates, seed {seed} ({row.name})",
        _task(folder, stage, tables),
        [f"ft_{index}of{row.n}.safetensors" for index in range(1, row.n + 1)],
        updates=row.n * config.steps,
    )  # fmt: skip


def _result_job(
    row: RowPlan, stage: Stage, training: Job | None = None, seed: int | None = None
) -> Job:
    """Merge, where the row asks for it, then measure under every measure."""
    tables: dict[str, dict[str, Any]] = {}
    if row.kind == "merged":  # whose search draws images of its own
        tables = {name: dict(stage.tables[name]) for name in ("data", "sample", "eval")}
        tables["merge"] = _whole(stage.merge(row))
    digest = _digest(
        tables, stage, training=training and training.folder.parent.name, kind=row.kind,
        measures=[_deciding(one) for one in stage.measures],
    )  # fmt: skip
    place = "once" if seed is None else f"seed-{seed}"
    folder = stage.folder / "rows" / f"{slug(row.name)}-{digest}" / place
    models = [training.folder / name for name in training.outputs] if training else [stage.base]
    if tables:
        tables["merge"]["seed"] += seed or 0
    task = _task(
        folder, stage, tables, models=[os.path.relpath(path, folder) for path in models],
        measures=stage.measures,
    )  # fmt: skip
    title = row.name if seed is None else f"{row.name}, seed {seed}"
    outputs = [f"measure-{index}.json" for index in range(len(stage.measures))]
    return Job(folder, title, task, outputs, training)


def _task(folder: Path, stage: Stage, tables: Tables, **more: Any) -> dict[str, Any]:
    """What job.json says; the base is told as seen from there, for folders move."""
    pipeline = {"pipeline": stage.tables["model"].get("pipeline")}
    model = {"base": os.path.relpath(stage.base, folder), **pipeline}
    live = {"data": stage.tables["data"], **tables, "model": model}
    return {"tables": live, "device": stage.device, "dtype": stage.dtype, **more}


def slug(name: str) -> str:
    """A row's name as part of a file name: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "row"


def _digest(tables: Tables, stage: Stage, **more: Any) -> str:
    """Eight hexadecimal digits that tell what decides a result from all else."""
    pipeline = stage.tables["model"].get("pipeline")
    decides = {
        "tables": _deciding(tables), "base": stage.record.fingerprint, "dtype": stage.dtype,
        "pipeline": pipeline, **more,
    }  # fmt: skip
    text = json.dumps(decides, sort_keys=True, default=list)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _deciding(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {
        table: values if table not in _LEFT_ALONE else
        {name: value for name, value in values.items() if name not in _LEFT_ALONE[table]}
        for table, values in tables.items()
    }  # fmt: skip


def do_job(folder: Path, progress: Progress = silent) -> None:
    """Do what is not done yet of the job in `folder`, as its job.json says.

    Raises Stopped where another process does it, else what the verbs raise.
    """
    from deme_cli.evaluation.evaluate import evaluate
    from deme_cli.merging.merge import merge
    from deme_cli.training.finetune import finetune

    with contextlib.chdir(folder), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(claim(Path("job")))
        except ConfigError as error:
            raise Stopped(str(error), exit_code=_LEFT[0]) from error
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
                progress(Step(settled, total, "comparison", "job", detail=_told(running)))
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


def _told(running: Mapping[Path, tuple[Job, Any, float]]) -> str:
    jobs = [job for job, _, _ in running.values()]
    done = sum(last_step(curve) for job in jobs for curve in job.curves)
    updates = sum(job.updates for job in jobs)
    return f"{len(jobs)} running" + (f", {done}/{updates} updates" if updates else "")
