"""Read what the jobs of a comparison have left, finished or not, into one `Comparison`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deme_cli.artifacts import read_record
from deme_cli.comparison.jobs import Job, RowJobs
from deme_cli.comparison.plan import Plan
from deme_cli.comparison.results import (
    Column,
    Comparison,
    Result,
    RowResult,
    SearchCost,
    lower_is_better,
)
from deme_cli.config import FinetuneConfig
from deme_cli.errors import ArtifactError
from deme_cli.evaluation.comparable import compare


def collect(plan: Plan, rows: Sequence[RowJobs], *, flops: Mapping[str, float]) -> Comparison:
    """The table as far as it is. flops: of one update, by row.

    Raises ArtifactError where a finished job has left a file that cannot be read, or rows were
    trained or measured on images that are not the same any more.
    """
    found = tuple(_row(row, plan, flops.get(row.row.name, 0.0)) for row in rows)
    columns = dict.fromkeys(c for row in found for result in row.results for c in result.values)
    _require_same_images(rows)
    cards = _cards(plan, rows)
    return Comparison(
        title=plan.title,
        columns=tuple(columns),
        rows=found,
        protocol=tuple(_protocol(plan, cards)),
        published=plan.published,
        cards=cards,
    )


def _row(jobs: RowJobs, plan: Plan, flops: float) -> RowResult:
    row, config = jobs.row, jobs.finetune
    failed = [failure for seed in jobs.results if (failure := jobs.failure(seed))]
    results = tuple(
        Result(
            seed=seed,
            values=_values(job, plan),
            seconds=_training_seconds(jobs.trainings.get(seed), config),
            **_merge(job.folder / "merged.safetensors"),
        )
        for seed, job in jobs.results.items()
        if job.is_done
    )
    updates = row.n * config.steps if config else 0
    return RowResult(
        name=row.name,
        kind=row.kind,
        num_ranges=row.n,
        settings=dict(jobs.apart),
        results=results,
        updates=updates,
        images=updates * config.batch_size * config.accumulation if config else 0,
        flops=updates * flops,
        published=row.published,
        failures=tuple(failure.message for failure in failed),
        pending=len(jobs.results) - len(results) - len(failed),
    )


def _values(job: Job, plan: Plan) -> dict[Column, tuple[float, ...]]:
    values = {}
    for index, measure in enumerate(plan.measures):
        row = _measured(job.folder / f"measure-{index}.json")
        for metric, figure in row["metrics"].items():
            column = Column(metric, measure.name, lower_is_better(metric))
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


def _merge(merged: Path) -> dict[str, Any]:
    """The coefficients of a merged model and what their search took; {} where nothing is merged."""
    if not merged.exists():
        return {}
    record = read_record(merged, "merged")
    found: dict[str, Any] = {"coefficients": tuple(record.coefficients)}
    if search := record.search:
        rungs = search.get("rungs", [])
        images = sum(r["evaluations"] * r["num"] for r in rungs if not _is_loss(r["objective"]))
        found["search"] = SearchCost(
            search["evaluations"], images, search["seconds"], search["objective"]
        )
    return found


def _is_loss(objective: str) -> bool:
    return objective.startswith(("loss", "experts"))


def _cards(plan: Plan, rows: Sequence[RowJobs]) -> dict[str, Any]:
    """The protocol card of each measure, with the number of images; that of the first row.

    Raises ArtifactError where another row was measured under another, as against other images.
    """
    cards: dict[str, Any] = {}
    for jobs in rows:
        for job in jobs.results.values():
            for index, measure in enumerate(plan.measures if job.is_done else ()):
                path = job.folder / f"measure-{index}.json"
                row = _measured(path)
                num = next(iter(row["metrics"].values()))["n"]
                card = {**row["protocol"], "num": num}
                first = cards.setdefault(measure.name, card)
                for name, ours, theirs in compare(first, card, first["num"], num) or ():
                    if name != "versions":
                        raise ArtifactError(
                            f"{path}: measured with {name} = {theirs}, other rows with {ours}; "
                            f"remove its folder, and the row is measured again"
                        )
    return cards


def _require_same_images(rows: Sequence[RowJobs]) -> None:
    """Raises ArtifactError where two rows were trained on images that differ."""
    first: dict[str, Any] = {}
    for jobs in rows:
        for job in jobs.trainings.values():
            if job.is_done:
                path = job.folder / job.commands[-1].output
                record = read_record(path, "expert")
                first = first or record.data
                if record.data != first:
                    raise ArtifactError(
                        f"{path}: trained on {record.data}, other rows on {first}; the images have "
                        f"changed since, choose another --output"
                    )


def _protocol(plan: Plan, cards: Mapping[str, Any]) -> list[str]:
    """What the figures depend on, as sentences."""
    from deme_cli.evaluation.protocol import describe_cards

    equal = "as many updates" if plan.budget == "updates" else "as many training FLOPs"
    lines = [
        f"every row that trains: {equal} (in whole updates of each range), the same images, and "
        f"training seeds {', '.join(map(str, plan.seeds))}; all rows are drawn from the same noise"
    ]
    for name, card in cards.items():
        told = [
            *describe_cards({"every row": card}),
            f"{card['num']:,} images of every row and evaluation seed",
        ]
        lines += [f"{name}: {line}" if name else line for line in told]
    return lines
