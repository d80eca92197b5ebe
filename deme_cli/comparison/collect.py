"""Read what the jobs of a comparison have left, finished or not, into one `Comparison`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deme_cli.artifacts import read_record
from deme_cli.comparison.jobs import Job, RowJobs, Stage
from deme_cli.comparison.plan import Plan
from deme_cli.comparison.results import Column, Comparison, Result, RowResult, SearchCost
from deme_cli.comparison.work import Failure
from deme_cli.config import FinetuneConfig
from deme_cli.errors import ArtifactError
from deme_cli.records import MergedRecord

_HIGHER_IS_BETTER = ("clip_score", "accuracy")


def collect(
    plan: Plan,
    stage: Stage,
    rows: Sequence[RowJobs],
    *,
    failures: Mapping[Path, Failure],
    flops: Mapping[str, float],
) -> Comparison:
    """The table as far as it is. flops: of one update, by row.

    Raises ArtifactError where a finished job has left a file that cannot be read.
    """
    found = tuple(_row(row, plan, failures, flops.get(row.row.name, 0.0)) for row in rows)
    columns = dict.fromkeys(c for row in found for result in row.results for c in result.values)
    cards = _cards(plan, rows)
    return Comparison(
        title=plan.title,
        columns=tuple(columns),
        rows=found,
        protocol=tuple(_protocol(plan, stage, cards)),
        published=plan.published,
        cards=cards,
    )


def _row(jobs: RowJobs, plan: Plan, failures: Mapping[Path, Failure], flops: float) -> RowResult:
    row, config = jobs.row, jobs.finetune
    done = {seed: job for seed, job in jobs.results.items() if job.is_done}
    failed = [
        failures[job.folder].message for job in jobs.results.values() if job.folder in failures
    ]
    updates = row.n * config.steps if config else 0
    return RowResult(
        name=row.name,
        kind=row.kind,
        num_ranges=row.n,
        settings=_apart(jobs),
        results=tuple(
            Result(
                seed=seed,
                values=_values(job, plan),
                seconds=_training_seconds(jobs.trainings.get(seed), config),
                search=_search_cost(job.folder / "merged.safetensors"),
            )
            for seed, job in done.items()
        ),
        updates=updates,
        images=updates * config.batch_size * config.accumulation if config else 0,
        flops=updates * flops,
        published=row.published,
        failures=tuple(failed),
        pending=len(jobs.results) - len(done) - len(failed),
    )


def _apart(jobs: RowJobs) -> dict[str, Any]:
    """What sets a row apart from plain finetuning, as far as it was set."""
    config = jobs.finetune
    if config is None:
        return {}
    plain = FinetuneConfig(
        **{**asdict(config), "p": 0.0, "consistency": 0.0, "projection": "none",
           "loss_weighting": "none", "weighting_gamma": None, "normalise_weighting": False,
           "multitask": "none"}
    )  # fmt: skip
    ours, theirs = asdict(config), asdict(plain)
    apart = {name: value for name, value in ours.items() if value != theirs[name]}
    if config.multitask != "none":
        apart |= {"clusters": config.clusters, "cluster_by": config.cluster_by}
    return {**apart, **({"by": jobs.row.by} if jobs.row.n > 1 else {}), **jobs.row.merge}


def _values(job: Job, plan: Plan) -> dict[Column, tuple[float, ...]]:
    values = {}
    for index, measure in enumerate(plan.measures):
        row = _measured(job.folder / f"measure-{index}.json")
        for metric, figure in row["metrics"].items():
            column = Column(metric, measure.name, metric not in _HIGHER_IS_BETTER)
            values[column] = tuple(figure["values"])
    return values


def _measured(path: Path) -> dict[str, Any]:
    try:
        (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {"metrics": row["metrics"], "protocol": row["protocol"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error}); remove its folder, and the row is measured again"
        ) from error


def _training_seconds(job: Job | None, config: FinetuneConfig | None) -> float:
    """Seconds in the training loops of a job, from the rates that its curves tell."""
    if job is None or config is None:
        return 0.0
    seconds, size = 0.0, config.batch_size
    for curve in job.curves:
        step = 0
        try:
            records = [json.loads(line) for line in curve.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{curve}: cannot be read ({error}); remove its folder") from error
        for record in records:
            images = (record["step"] - step) * config.accumulation * size
            seconds, step = seconds + images / record["images_per_second"], record["step"]
    return seconds


def _search_cost(merged: Path) -> SearchCost | None:
    if not merged.exists():
        return None
    record = read_record(merged, "merged")
    assert isinstance(record, MergedRecord)
    if not record.search:
        return None
    rungs = record.search.get("rungs", [])
    images = sum(r["evaluations"] * r["num"] for r in rungs if not _is_loss(r["objective"]))
    return SearchCost(record.search["evaluations"], images, record.search["seconds"])


def _is_loss(objective: str) -> bool:
    return objective.startswith(("loss", "experts"))


def _cards(plan: Plan, rows: Sequence[RowJobs]) -> dict[str, Any]:
    """The protocol card of each measure, from the first row that has one."""
    cards: dict[str, Any] = {}
    for jobs in rows:
        for job in jobs.results.values():
            for index, measure in enumerate(plan.measures):
                if job.is_done and measure.name not in cards:
                    row = _measured(job.folder / f"measure-{index}.json")
                    cards[measure.name] = row["protocol"]
    return cards


def _protocol(plan: Plan, stage: Stage, cards: Mapping[str, Any]) -> list[str]:
    """What the figures depend on, as sentences."""
    from deme_cli.evaluation.protocol import describe_cards

    equal = "as many updates" if plan.budget == "updates" else "as many training FLOPs"
    lines = [
        f"every row that trains: {equal} (in whole updates of each range), the same images, and "
        f"training seeds {', '.join(map(str, plan.seeds))}; all rows are drawn from the same noise"
    ]
    for name, card in cards.items():
        lines += [
            f"{name}: {line}" if name else line for line in describe_cards({"every row": card})
        ]
    return lines
