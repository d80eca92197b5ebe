"""From a plan to jobs: every row's settings checked, and a folder for everything that is made.

A training job makes the experts (or the one network) of some settings and one seed; rows with the
same settings share it. A result job merges, where its row asks for that, and measures. A folder's
name ends with a digest of everything that decides what will lie in it: a changed setting is another
folder, so what is finished stays true and only what changed is made anew.

And what training costs in floating-point operations, counted on one image and scaled: those of
convolutions, matrix products and attention in the denoiser and in the frozen base, which is nearly
all there is; not the optimizer, the moving averages, or the frozen VAE and text encoders.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deme_cli.artifacts import BaseRecord, read_record
from deme_cli.comparison.jobs import Job
from deme_cli.comparison.plan import COMMON, PLAIN, Plan, RowPlan, Tables, naming
from deme_cli.config import NOT_RESULT, TABLES, DataConfig, FinetuneConfig, MergeConfig
from deme_cli.data.image_source import KNOWN_DATASETS, find_image_source
from deme_cli.data.prompts import KNOWN_PROMPTS
from deme_cli.diffusion.execution import forward_flops
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ConfigError
from deme_cli.files import shown_path, write_whole
from deme_cli.run_file import RunFile
from deme_cli.timesteps import RangeChoice, TimestepRange
from deme_cli.training.clusters import Affinity, cluster_draws, read_affinity, split_times
from deme_cli.training.objective import expert_losses
from deme_cli.training.setup import Plan as TrainingPlan
from deme_cli.training.setup import Run, affinity_path, prepare, require_companions
from deme_cli.training.state import open_networks
from deme_cli.training.weighting import Reduction

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
_PLACES = (
    "source", "pipeline", "cache", "prompts", "fid", "kid", "prc", "features", "clip_weights",
)  # fmt: skip
_NAMES = {*KNOWN_DATASETS, *KNOWN_PROMPTS, "digits", "auto", "off", "inception", "clip", "dinov2"}


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
        return flops_per_update(config, passes_of(self, config))


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
        common["eval"] = {k: v for k, v in common["eval"].items() if k not in ("fid", "kid", "prc")}
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


@dataclass(frozen=True)
class PassCost:
    """FLOPs of one image: through the network forward, backward, and through the base."""

    forward: int
    backward: int
    base: int


def passes_of(stage: Stage, config: FinetuneConfig) -> PassCost:
    """The costs of one image through `stage`'s base and what `config` adds to it, counted once and
    kept in its folder."""
    path, kept = stage.folder / "passes.json", {}
    added = {name: getattr(config, name) for name in ("projection", "lora", "lora_targets")}
    key = f"{json.dumps(added)} {stage.record.fingerprint} {json.dumps(stage.tables['data'])}"
    with suppress(OSError, ValueError):  # not there, or damaged
        kept = json.loads(path.read_text())
    if key in kept:
        return PassCost(**kept[key])
    settings = FinetuneConfig(**added, held_out=0, cache="off", batch_size=1)
    whole = TimestepRange(0, stage.record.num_train_timesteps)
    plan = TrainingPlan(
        stage.base, DataConfig(**stage.tables["data"]), settings, Path("unused.safetensors"),
        RangeChoice(whole, 1, 1), device="cpu", pipeline=stage.tables["model"].get("pipeline"),
    )  # fmt: skip
    passes = count_passes(prepare(plan))
    write_whole(path, [json.dumps({**kept, key: asdict(passes)}, indent=1).encode()])
    return passes


def count_passes(run: Run) -> PassCost:
    """Count the passes of `run`'s networks on its first training image.

    The base counts also where this run does not ask it.
    """
    network, schedule = open_networks(run)[0], run.denoiser.schedule
    x0, conditions = run.examples.draw([0], flip=None, generator=None)
    x0, first = x0.float().cpu(), schedule.indices(run.choice.range).start
    forward = forward_flops(network, x0, conditions)
    base = 0 if run.from_scratch else forward_flops(run.denoiser.network, x0, conditions)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = expert_losses(
            network, None, schedule, x0=x0, eps=torch.zeros_like(x0), t=torch.tensor([first]),
            conditions=conditions, consistency=0.0,
        )  # fmt: skip
        losses.total.mean().backward()
    return PassCost(forward, counter.get_total_flops() - forward, base)


def flops_per_update(config: FinetuneConfig, passes: PassCost) -> float:
    """One optimizer update of `config`, on average over the run.

    Gradients of k clusters cost k backward passes through the whole batch, in every update (pcgrad)
    or in the first batch of every `multitask_every`-th (nashmtl).
    """
    images = config.batch_size * config.accumulation
    backwards = float(config.accumulation)
    if config.multitask == "pcgrad":
        backwards *= config.clusters
    elif config.multitask == "nashmtl":
        backwards += (config.clusters - 1) / config.multitask_every
    base = passes.base * images if config.consistency else 0
    return passes.forward * images + passes.backward * config.batch_size * backwards + base
