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

from deme_cli.artifacts import BaseRecord, read_record
from deme_cli.comparison.jobs import Stage
from deme_cli.comparison.passes import PassCost, flops_per_update
from deme_cli.comparison.plan import COMMON, MeasurePlan, Plan, RowPlan
from deme_cli.comparison.rows import Tables, finetune_settings, merge_settings
from deme_cli.config import TABLES, DataConfig, FinetuneConfig
from deme_cli.data.image_source import KNOWN_DATASETS, find_image_source
from deme_cli.data.prompts import KNOWN_PROMPTS
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ConfigError, MissingError
from deme_cli.files import shown_path
from deme_cli.run_file import RunFile
from deme_cli.timesteps import parse_span
from deme_cli.training.clusters import Affinity, cluster_draws, read_affinity, split_times
from deme_cli.training.setup import affinity_path, require_companions
from deme_cli.training.weighting import Reduction

_IMAGES = ("digits", *KNOWN_DATASETS)
_PLACES: dict[str, dict[str, tuple[str, ...]]] = {  # settings that may name a place, or a name
    "model": {"pipeline": ()},
    "data": {"source": _IMAGES},
    "finetune": {"cache": ("auto", "off")},
    "sample": {"prompts": KNOWN_PROMPTS},
    "eval": {
        "fid": _IMAGES, "kid": _IMAGES, "features": ("inception", "clip", "digits"),
        "accuracy": ("digits",), "clip_weights": (),
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
