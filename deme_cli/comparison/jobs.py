"""From a plan to jobs: folders in which `deme` commands run, one after the other.

A training job makes the experts (or the one network) of some settings and one seed; rows with the
same settings share it. A result job merges, where its row asks for that, and measures. A folder's
name ends with a digest of everything that decides what will lie in it: a changed setting is another
folder, so what is finished stays true and only what changed is made anew. The tables of the plan
win over those of `deme.toml`; paths become absolute, since jobs run in folders of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deme_cli.artifacts import BaseRecord, read_record
from deme_cli.comparison.passes import PassCost, flops_per_update
from deme_cli.comparison.plan import (
    COMMON,
    MeasurePlan,
    Plan,
    RowPlan,
    Tables,
    as_json,
    deciding,
    deciding_measures,
    digest,
    finetune_settings,
    merge_settings,
    settings_apart,
)
from deme_cli.config import (
    CONFIG_NAME,
    TABLES,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    MergeConfig,
    SampleConfig,
)
from deme_cli.data.image_source import KNOWN_DATASETS, find_image_source
from deme_cli.data.prompts import KNOWN_PROMPTS
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ConfigError, MissingError
from deme_cli.files import shown_path
from deme_cli.run_file import RunFile, render_run_file
from deme_cli.timesteps import parse_span
from deme_cli.training.clusters import Affinity, cluster_draws, read_affinity, split_times
from deme_cli.training.setup import affinity_path, require_companions
from deme_cli.training.weighting import Reduction

DONE_NAME, FAILED_NAME, SETTINGS_NAME = "done.json", "failed.json", "settings.json"


@dataclass(frozen=True)
class Stage:
    """What all jobs of a comparison share: where it lies, what it starts from, the common tables.

    ranges: start:stop of the divisions that rows ask for, by (by, n). updates: in total, by row.
    The device does not decide a result, all else does.
    """

    folder: Path
    base: Path
    fingerprint: str
    tables: Tables
    ranges: Mapping[tuple[str, int], Sequence[str]]
    updates: Mapping[str, int]
    device: str = "auto"
    dtype: str = "fp32"
    measures: tuple[MeasurePlan, ...] = (MeasurePlan(),)  # each with all its settings
    affinity: str = ""  # digest of the gradients that rows may be clustered by

    @property
    def decides(self) -> dict[str, Any]:
        """What decides every result: weights, images, precision, and where frozen parts are."""
        pipeline = self.tables.get("model", {}).get("pipeline")
        data = asdict(DataConfig(**self.tables.get("data", {})))
        return {
            "base": self.fingerprint, "dtype": self.dtype, "data": data, "pipeline": pipeline,
        }  # fmt: skip

    @property
    def candidates(self) -> dict[str, Any]:
        """How a search draws and measures its candidates, besides [merge]."""
        sample, evaluation = (self.tables.get(name, {}) for name in ("sample", "eval"))
        return {
            "sample": deciding(SampleConfig(**sample)), "eval": deciding(EvalConfig(**evaluation)),
        }  # fmt: skip

    @property
    def options(self) -> tuple[str, ...]:
        """What every command is told besides its deme.toml."""
        return ("--device", self.device, "--dtype", self.dtype, "--quiet")


@dataclass(frozen=True)
class Command:
    """Words after `deme`; the command is done where `output` lies in the job's folder."""

    words: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Failure:
    """Why a job has no result, and the exit code of the command that failed."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Job:
    """Commands that run in `folder`, once the jobs in `needs` are done.

    files: texts by name that lie there before the first command.
    """

    folder: Path
    title: str
    commands: tuple[Command, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[Path, ...] = ()
    curves: tuple[Path, ...] = ()
    updates: int = 0  # of training, so that progress can be told

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE_NAME).exists()

    @property
    def failure(self) -> Failure | None:
        """How the last try failed, in whatever process; None if it did not."""
        try:
            return Failure(**json.loads((self.folder / FAILED_NAME).read_text()))
        except (OSError, ValueError, TypeError):  # not there, or being tried again
            return None


@dataclass(frozen=True)
class RowJobs:
    """The jobs of one row: per training seed (None where nothing is trained) its result job and
    what that needs. `finetune` and `merge` hold every setting of its training and its merge,
    `apart` those that plain finetuning has otherwise, and how the coefficients are found."""

    row: RowPlan
    results: Mapping[int | None, Job]
    trainings: Mapping[int | None, Job]
    finetune: FinetuneConfig | None = None
    merge: MergeConfig | None = None
    apart: Mapping[str, Any] = field(default_factory=dict)

    @property
    def jobs(self) -> list[Job]:
        return [*self.trainings.values(), *self.results.values()]

    def failure(self, seed: int | None) -> Failure | None:
        """Why there is no result from this seed, if something failed."""
        jobs = (self.results[seed], *([self.trainings[seed]] if seed in self.trainings else []))
        if self.results[seed].is_done:
            return None
        return next((one.failure for one in jobs if one.failure), None)


def jobs_of(plan: Plan, stage: Stage) -> list[RowJobs]:
    """The jobs of every row, in the order of the plan."""
    return [_row_jobs(row, plan, stage) for row in plan.rows]


def _row_jobs(row: RowPlan, plan: Plan, stage: Stage) -> RowJobs:
    if row.kind == "base":
        return RowJobs(row, {None: _result_job(row, stage, None, None, None)}, {})
    config = finetune_settings(row, stage.tables, updates=stage.updates[row.name])
    merge = merge_settings(row, stage.tables)
    trainings: dict[int | None, Job] = {
        seed: _training_job(row, config, stage, seed) for seed in plan.seeds
    }
    results = {seed: _result_job(row, stage, merge, seed, job) for seed, job in trainings.items()}
    apart = settings_apart(row, config, merge, stage.tables)
    return RowJobs(row, results, trainings, config, merge, apart)


def _training_job(row: RowPlan, config: FinetuneConfig, stage: Stage, seed: int) -> Job:
    """`deme finetune --range all` with these settings, all of them in its deme.toml."""
    ranges = list(stage.ranges[row.by, row.n])
    decides = {**deciding(config), "ranges": ranges, **stage.decides}
    if config.multitask != "none" and config.cluster_by == "gradient":
        decides["affinity"] = stage.affinity
    name = f"{row.n}x{config.steps}-{digest(decides)}"
    folder = stage.folder / "trainings" / name / f"seed-{seed}"
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    tables = {
        "split": {"n": row.n, "by": row.by, "ranges": ranges},
        "finetune": {**settings, "seed": seed},
    }
    experts = _expert_names(row.n)
    return Job(
        folder=folder,
        title=f"{row.n} x {config.steps} updates, seed {seed} ({row.name})",
        commands=(Command(("finetune", "--range", "all", *stage.options), experts[-1]),),
        files={CONFIG_NAME: _run_file(tables, stage, folder), SETTINGS_NAME: as_json(decides)},
        curves=tuple(folder / f"{Path(name).stem}.metrics.jsonl" for name in experts),
        updates=row.n * config.steps,
    )


def _result_job(
    row: RowPlan, stage: Stage, merge: MergeConfig | None, seed: int | None, training: Job | None
) -> Job:
    """Merge, where the row asks for it, then `deme eval` under every measure."""
    decides = {
        "training": training.folder.parent.name if training else "none",
        "kind": row.kind,
        "merge": {**deciding(merge), **stage.candidates} if merge else {},
        "measures": deciding_measures(stage.measures),
        **stage.decides,
    }
    name = f"{slug(row.name)}-{digest(decides)}"
    folder = stage.folder / "rows" / name / ("once" if seed is None else f"seed-{seed}")
    models = _models(row, stage, training, folder)
    commands, files = [], {SETTINGS_NAME: as_json({**decides, "row": row.name})}
    if merge:
        words = ("merge", *models, "--no-report", "--output", "merged.safetensors")
        settings = {name: value for name, value in asdict(merge).items() if value is not None}
        tables = {"merge": {**settings, "seed": merge.seed + (seed or 0)}}
        commands.append(Command((*words, *stage.options), "merged.safetensors"))
        files[CONFIG_NAME] = _run_file(tables, stage, folder)
        models = ["merged.safetensors"]
    for index, measure in enumerate(stage.measures):
        toml, output = f"measure-{index}.toml", f"measure-{index}.json"
        files[toml] = _run_file({"sample": measure.sample, "eval": measure.eval}, stage, folder)
        words = ("eval", *models, "--config", toml, "--output", output)
        commands.append(Command((*words, *stage.options), output))
    title = row.name if seed is None else f"{row.name}, seed {seed}"
    needs = (training.folder,) if training else ()
    return Job(folder, title, tuple(commands), files, needs)


def _models(row: RowPlan, stage: Stage, training: Job | None, folder: Path) -> list[str]:
    """The artifacts that a row is made of, as seen from its folder."""
    if training is None:
        return [os.path.relpath(stage.base, folder)]
    return [os.path.relpath(training.folder / name, folder) for name in _expert_names(row.n)]


def _expert_names(n: int) -> list[str]:
    return [f"ft_{index}of{n}.safetensors" for index in range(1, n + 1)]


def _run_file(tables: Tables, stage: Stage, folder: Path) -> str:
    """A deme.toml of the common tables, `tables` in place of theirs, for a job in `folder`."""
    model = {**stage.tables.get("model", {}), "base": os.path.relpath(stage.base, folder)}
    live = {**stage.tables, **tables, "model": model}
    return render_run_file({name: live[name] for name in TABLES if name in live})


def slug(name: str) -> str:
    """A row's name as part of a file name: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "row"


_IMAGES = ("digits", *KNOWN_DATASETS)
_PLACES: dict[str, dict[str, tuple[str, ...]]] = {  # settings that may name a place, or a name
    "model": {"pipeline": ()},
    "data": {"source": _IMAGES},
    "finetune": {"cache": ("auto", "off")},
    "sample": {"prompts": KNOWN_PROMPTS},
    "eval": {
        "fid": _IMAGES, "kid": _IMAGES, "features": ("inception", "clip", "digits"),
        "clip_weights": (),
    },
}  # fmt: skip
_OF_ROWS = (  # settings of [finetune] that are what rows differ in, or follow from the plan
    "loss_weighting", "weighting_gamma", "weighting_k", "normalise_weighting", "multitask",
    "clusters", "cluster_by", "multitask_lr", "multitask_every", "seed",
)  # fmt: skip
_REFERENCES = ("fid", "kid")


def common_tables(plan: Plan, run: RunFile) -> dict[str, dict[str, Any]]:
    """The settings that hold for every row, each table checked.

    What rows differ in is not taken from `deme.toml`, or plain finetuning would not be plain.
    Raises ConfigError, naming the table, on a setting that cannot be.
    """
    tables: dict[str, dict[str, Any]] = {}
    for name in COMMON:
        given = dict(run.tables.get(name, {}))
        if name == "finetune":
            given = {key: value for key, value in given.items() if key not in _OF_ROWS}
        given = _anchor(name, {**given, **plan.tables.get(name, {})}, run)
        if given:
            tables[name] = given
        run.settings(TABLES[name], **given)
    return tables


def _measures(plan: Plan, run: RunFile, tables: Tables) -> tuple[MeasurePlan, ...]:
    """The plan's measures with all their settings, the places in them absolute, each checked.

    Where a plan has several, each names its own reference: another set of prompts has another.
    """
    common = {name: dict(tables.get(name, {})) for name in ("sample", "eval")}
    if len(plan.measures) > 1:
        common["eval"] = {k: v for k, v in common["eval"].items() if k not in _REFERENCES}
    measures = []
    for one in plan.measures:
        whole = {}
        for name in ("sample", "eval"):
            whole[name] = {**common[name], **_anchor(name, getattr(one, name), run)}
            try:
                TABLES[name](**whole[name])
            except ConfigError as error:
                raise ConfigError(f"measure {one.name!r}: {error}") from error
        measures.append(MeasurePlan(one.name, **whole))
    return tuple(measures)


def _anchor(table: str, given: Mapping[str, Any], run: RunFile) -> dict[str, Any]:
    """The settings of a table with the places in them absolute, where there is such a place.

    A known name stays one, though a folder of that name may lie here.
    """
    found = dict(given)
    for key, names in _PLACES.get(table, {}).items():
        if (place := found.get(key)) and place not in names:
            path = Path(run.seen(place)).expanduser()
            found[key] = str(path.resolve()) if path.exists() else place
    return found


def open_stage(
    plan: Plan, run: RunFile, folder: Path, *, base: Path, device: str = "auto", dtype: str = "fp32"
) -> Stage:
    """The stage of `plan` in `folder`, every row's settings checked before anything runs.

    `updates` are those of equal numbers; see `with_equal_compute`. Raises MissingError where
    there is no base or no gradients for a row to be divided by, ConfigError on settings.
    """
    if not base.exists():
        raise MissingError(f"{base}: no base there; make one with `deme split`, or use --model")
    record = read_record(base, "base")
    tables = common_tables(plan, run)
    images = DataConfig(**tables.get("data", {})).source
    if not images:
        raise ConfigError("no training images: set [data] source in deme.toml, or use --data")
    find_image_source(images)
    require_companions(record, tables.get("model", {}).get("pipeline"))
    total = plan.updates or plan.n * FinetuneConfig(**tables.get("finetune", {})).steps
    stage = Stage(
        folder=folder.resolve(),
        base=base.resolve(),
        fingerprint=record.fingerprint,
        tables=tables,
        ranges=_ranges(plan, record, base),
        updates={row.name: total for row in plan.rows},
        device=device,
        dtype=dtype,
        measures=_measures(plan, run, tables),
        affinity=_digest(affinity_path(base)),
    )
    for row in plan.rows:
        _check_row(row, stage, record)
    return stage


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _check_row(row: RowPlan, stage: Stage, record: BaseRecord) -> None:
    """Check a row's settings, and that this base has what they ask for."""
    if row.kind == "base":
        return
    config = finetune_settings(row, stage.tables, updates=stage.updates[row.name])
    merge_settings(row, stage.tables)
    schedule, whole = read_schedule(record.scheduler_config), record.num_train_timesteps
    try:
        Reduction(config, schedule)
        for text in stage.ranges[row.by, row.n] if config.multitask != "none" else ():
            span = parse_span(text, "range")
            if config.p > 0 and len(span) < whole:
                raise ConfigError(f"clusters divide each range, and p = {config.p} draws outside")
            affinity = _affinity(stage.base, record) if config.cluster_by == "gradient" else None
            draws = schedule.indices(span)
            cluster_draws(draws, config.clusters, config.cluster_by, schedule, affinity)
    except ConfigError as error:
        raise ConfigError(f"row {row.name!r}: {error}") from error


def _affinity(base: Path, record: BaseRecord) -> Affinity:
    """The gradients beside the base; the message where they are missing makes them there."""
    path = affinity_path(base)
    command = f"deme analyze gradients {shown_path(base)} -o {shown_path(path)}"
    return read_affinity(path, record.fingerprint, command=command)


def _ranges(plan: Plan, record: BaseRecord, base: Path) -> dict[tuple[str, int], list[str]]:
    """start:stop of every division that the rows ask for."""
    wanted = {("uniform", 1)} | {(row.by, row.n) for row in plan.rows if row.kind != "base"}
    schedule = read_schedule(record.scheduler_config)
    divisions = {}
    for by, n in wanted:
        affinity = None
        if by == "gradient":
            affinity = _affinity(base, record)
        divisions[by, n] = [str(span) for span in split_times(n, by, schedule, affinity)]
    return divisions


def flops_by_row(plan: Plan, stage: Stage, passes: Mapping[str, PassCost]) -> dict[str, float]:
    """FLOPs of one update of each row that trains; passes: by placement of the projection."""
    found = {}
    for row in plan.rows:
        if row.kind != "base":
            config = finetune_settings(row, stage.tables, updates=stage.updates[row.name])
            found[row.name] = flops_per_update(config, passes[config.projection])
    return found


def with_equal_compute(plan: Plan, stage: Stage, passes: Mapping[str, PassCost]) -> Stage:
    """The stage in which every row has the FLOPs that plain finetuning spends on its updates."""
    plain = RowPlan("plain finetuning", "finetune", 1)
    total = next(iter(stage.updates.values()))
    config = finetune_settings(plain, stage.tables, updates=total)
    budget = total * flops_per_update(config, passes["none"])
    per_update = flops_by_row(plan, stage, passes)
    updates = {name: max(1, round(budget / flops)) for name, flops in per_update.items()}
    return replace(stage, updates={**stage.updates, **updates})


def projections_of(plan: Plan, tables: Tables) -> list[str]:
    """The placements of the projection that rows train with, plain finetuning's first."""
    found = ["none"]
    for row in plan.rows:
        if row.kind != "base":
            found.append(finetune_settings(row, tables, updates=row.n).projection)
    return list(dict.fromkeys(found))
