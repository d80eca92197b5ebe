"""From a plan to jobs: folders in which `deme` commands run, one after the other.

A training job makes the experts (or the one network) of some settings and one seed; rows with the
same settings share it. A result job merges, where its row asks for that, and measures. A folder's
name ends with a digest of everything that decides what will lie in it: a changed setting is another
folder, so what is finished stays true and only what changed is made anew. No torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deme_cli.comparison.digests import as_json, deciding, deciding_measures, digest
from deme_cli.comparison.plan import MeasurePlan, Plan, RowPlan
from deme_cli.comparison.rows import Tables, finetune_settings, merge_settings, settings_apart
from deme_cli.config import (
    CONFIG_NAME,
    TABLES,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    MergeConfig,
    SampleConfig,
)
from deme_cli.run_file import render_run_file

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
