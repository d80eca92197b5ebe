"""What all jobs of a comparison share, made from a plan, a `deme.toml` and the command line.

The tables of the plan win over those of `deme.toml`. Paths become absolute, since jobs run in
folders of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deme_cli.artifacts import read_record
from deme_cli.comparison.jobs import Stage, Tables, finetune_settings
from deme_cli.comparison.plan import COMMON, MeasurePlan, Plan, RowPlan
from deme_cli.config import TABLES, DataConfig, FinetuneConfig, MergeConfig
from deme_cli.errors import ConfigError, MissingError
from deme_cli.records import BaseRecord
from deme_cli.run_file import RunFile
from deme_cli.training.affinity import read_affinity
from deme_cli.training.cost import PassCost, flops_per_update
from deme_cli.training.places import affinity_path

_PLACES = {  # settings that may name a file or folder
    "model": ("pipeline",),
    "data": ("source",),
    "finetune": ("cache",),
    "sample": ("prompts",),
    "eval": ("fid", "kid", "features", "accuracy", "clip_weights"),
}


def common_tables(plan: Plan, run: RunFile) -> dict[str, dict[str, Any]]:
    """The settings that hold for every row, each table checked.

    Raises ConfigError, naming the table, on a setting that cannot be.
    """
    tables: dict[str, dict[str, Any]] = {}
    for name in COMMON:
        given = {**run.tables.get(name, {}), **plan.tables.get(name, {})}
        given = _anchor(name, given, run)
        if given:
            tables[name] = given
        run.settings(TABLES[name], **given)
    return tables


def _measures(plan: Plan, run: RunFile, tables: Tables) -> tuple[MeasurePlan, ...]:
    """The plan's measures with the places in them absolute, each checked."""
    measures = []
    for one in plan.measures:
        own = {name: _anchor(name, getattr(one, name), run) for name in ("sample", "eval")}
        for name, values in own.items():
            try:
                run.settings(TABLES[name], **{**tables.get(name, {}), **values})
            except ConfigError as error:
                raise ConfigError(f"measure {one.name!r}: {error}") from error
        measures.append(replace(one, **own))
    return tuple(measures)


def _anchor(table: str, given: Mapping[str, Any], run: RunFile) -> dict[str, Any]:
    """The settings of a table with the places in them absolute, where there is such a place."""
    found = dict(given)
    for key in _PLACES.get(table, ()):
        if found.get(key):
            found[key] = _anchored(found[key], run)
    return found


def _anchored(place: str, run: RunFile) -> str:
    found = Path(run.seen(place)).expanduser()
    return str(found.resolve()) if found.exists() else place


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
    assert isinstance(record, BaseRecord)
    tables = common_tables(plan, run)
    if not DataConfig(**tables.get("data", {})).source:
        raise ConfigError("no training images: set [data] source in deme.toml, or use --data")
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
    """Check the settings of a row, and that the gradients are there if it goes by them."""
    if row.kind == "base":
        return
    config = finetune_settings(row, stage.tables, updates=stage.updates[row.name])
    if config.multitask != "none" and config.cluster_by == "gradient":
        read_affinity(affinity_path(stage.base), record.fingerprint)
    try:
        merge = MergeConfig(**{**stage.tables.get("merge", {}), **row.merge})
        given = merge.coefficients if row.kind == "merged" else None
        if given is not None and len(given) != row.n:
            raise ConfigError(f"coefficients = {given}: expected {row.n}, one for each range")
    except ConfigError as error:
        raise ConfigError(f"row {row.name!r}: [merge] {error}") from error


def _ranges(plan: Plan, record: BaseRecord, base: Path) -> dict[tuple[str, int], list[str]]:
    """start:stop of every division that the rows ask for."""
    from deme_cli.diffusion.schedule import read_schedule
    from deme_cli.training.clusters import split_times

    wanted = {("uniform", 1)} | {(row.by, row.n) for row in plan.rows if row.kind != "base"}
    schedule = read_schedule(record.scheduler_config)
    divisions = {}
    for by, n in wanted:
        affinity = None
        if by == "gradient":
            affinity = read_affinity(affinity_path(base), record.fingerprint)
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
