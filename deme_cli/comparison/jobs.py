"""From a plan to jobs: folders in which `deme` commands run, one after the other.

A training job makes the experts (or the one network) of some settings and one seed; rows with the
same settings share it. A result job merges, where its row asks for that, and measures. A folder's
name ends with a digest of everything that decides what will lie in it: a changed setting is another
folder, so what is finished stays true and only what changed is made anew. No torch.
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

from deme_cli.comparison.plan import MeasurePlan, Plan, RowPlan
from deme_cli.config import CONFIG_NAME, NOT_RESULT, TABLES, FinetuneConfig, MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.run_file import render_run_file

DONE_NAME, SETTINGS_NAME = "done.json", "settings.json"
_PLAIN = {"p": 0.0, "consistency": 0.0, "projection": "none"}  # of rows of kind finetune

Tables = Mapping[str, Mapping[str, Any]]


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
    measures: tuple[MeasurePlan, ...] = (MeasurePlan(),)  # the plan's, their paths absolute
    affinity: str = ""  # digest of the gradients that rows may be clustered by

    @property
    def parts(self) -> dict[str, str]:
        """Where the frozen parts are taken from, if somebody said so."""
        pipeline = self.tables.get("model", {}).get("pipeline")
        return {"pipeline": pipeline} if pipeline else {}

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


@dataclass(frozen=True)
class RowJobs:
    """The jobs of one row: per training seed (None where nothing is trained) its result job and
    what that needs. `finetune` holds every setting of its training."""

    row: RowPlan
    results: Mapping[int | None, Job]
    trainings: Mapping[int | None, Job]
    finetune: FinetuneConfig | None


def jobs_of(plan: Plan, stage: Stage) -> list[RowJobs]:
    """The jobs of every row, in the order of the plan."""
    return [_row_jobs(row, plan, stage) for row in plan.rows]


def finetune_settings(row: RowPlan, tables: Tables, *, updates: int) -> FinetuneConfig:
    """Every setting of a row's training: the common ones, those of its kind, its own.

    Raises ConfigError, naming the row, on settings that do not go together.
    """
    plain = _PLAIN if row.kind == "finetune" else {}
    steps = max(updates // row.n, 1)
    common = dict(tables.get("finetune", {}))
    try:
        return FinetuneConfig(**{
            **common, **plain, **row.finetune, "steps": steps,
            "snapshot_every": None, "ema_lengths": None,
        })  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"row {row.name!r}: {error}") from error


def _row_jobs(row: RowPlan, plan: Plan, stage: Stage) -> RowJobs:
    if row.kind == "base":
        result = _result_job(row, stage, None, None)
        return RowJobs(row, {None: result}, {}, None)
    config = finetune_settings(row, stage.tables, updates=stage.updates[row.name])
    trainings = {seed: _training_job(row, config, stage, seed) for seed in plan.seeds}
    results = {seed: _result_job(row, stage, seed, job) for seed, job in trainings.items()}
    return RowJobs(row, results, trainings, config)


def _training_job(row: RowPlan, config: FinetuneConfig, stage: Stage, seed: int) -> Job:
    """`deme finetune --range all` with these settings, all of them in its deme.toml."""
    ranges = list(stage.ranges[row.by, row.n])
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    decides = {name: value for name, value in settings.items() if name not in NOT_RESULT}
    decides |= {"ranges": ranges, "base": stage.fingerprint, "dtype": stage.dtype}
    decides |= {"data": dict(stage.tables.get("data", {}))}
    decides |= stage.parts
    if config.multitask != "none" and config.cluster_by == "gradient":
        decides["affinity"] = stage.affinity
    name = f"{row.n}x{config.steps}-{_digest(decides)}"
    folder = stage.folder / "trainings" / name / f"seed-{seed}"
    live = {
        "split": {"n": row.n, "by": row.by, "ranges": ranges},
        "finetune": {**settings, "seed": seed},
    }
    stage = replace(stage, tables={**stage.tables, "finetune": {}})  # all of them are in `live`
    experts = _expert_names(row.n)
    return Job(
        folder=folder,
        title=f"{row.n} x {config.steps} updates, seed {seed} ({row.name})",
        commands=(Command(("finetune", "--range", "all", "--quiet", *stage.options), experts[-1]),),
        files={CONFIG_NAME: _run_file(live, stage, folder), SETTINGS_NAME: _json(decides)},
        curves=tuple(folder / f"{Path(name).stem}.metrics.jsonl" for name in experts),
        updates=row.n * config.steps,
    )


def _result_job(row: RowPlan, stage: Stage, seed: int | None, training: Job | None) -> Job:
    """Merge, where the row asks for it, then `deme eval` under every measure."""
    merge = {**stage.tables.get("merge", {}), **row.merge} if row.kind == "merged" else {}
    decides = {
        "training": training.folder.parent.name if training else "none",
        "kind": row.kind,
        "merge": merge,
        "measures": [asdict(measure) for measure in stage.measures],
        "base": stage.fingerprint,
        "dtype": stage.dtype,
        **{name: dict(stage.tables.get(name, {})) for name in ("sample", "eval", "data")},
        **stage.parts,
    }
    name = f"{slug(row.name)}-{_digest(decides)}"
    folder = stage.folder / "rows" / name / ("once" if seed is None else f"seed-{seed}")
    models = _models(row, stage, training, folder)
    commands, files = [], {SETTINGS_NAME: _json(decides)}
    if row.kind == "merged":
        words = ("merge", *models, "--no-report", "--output", "merged.safetensors")
        own = {**merge, "seed": MergeConfig(**merge).seed + (seed or 0)}
        commands.append(Command((*words, *stage.options), "merged.safetensors"))
        files[CONFIG_NAME] = _run_file({"merge": own}, stage, folder)
        models = ["merged.safetensors"]
    for index, measure in enumerate(stage.measures):
        toml, output = f"measure-{index}.toml", f"measure-{index}.json"
        live = {"sample": dict(measure.sample), "eval": dict(measure.eval)}
        files[toml] = _run_file(live, stage, folder)
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


def _run_file(live: Tables, stage: Stage, folder: Path) -> str:
    """A deme.toml with the common tables and `live` on top, its base seen from `folder`."""
    tables = {name: dict(values) for name, values in stage.tables.items()}
    tables["model"] = {**tables.get("model", {}), "base": os.path.relpath(stage.base, folder)}
    for name, values in live.items():
        tables[name] = {**tables.get(name, {}), **values}
    ordered = {name: tables[name] for name in TABLES if name in tables}
    return render_run_file(ordered)


def slug(name: str) -> str:
    """A row's name as part of a file name: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "row"


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True, default=list)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.blake2b(_json(values).encode(), digest_size=4).hexdigest()
