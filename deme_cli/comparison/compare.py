"""A table of methods under one protocol, every row trained and measured here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.artifacts import read_record
from deme_cli.comparison.plan import Plan, read_plan
from deme_cli.config import CONFIG_NAME, FinetuneConfig, SplitConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ArtifactError, ConfigError, DemeError
from deme_cli.evaluation.protocols import compare as differences
from deme_cli.files import write_whole
from deme_cli.run_file import RunFile, read_run_file

if TYPE_CHECKING:
    from deme_cli.comparison.figures import Column, Comparison, RowResult
    from deme_cli.comparison.jobs import Failure, Job, RowJobs, Stage


@dataclass(frozen=True)
class Compared:
    """The table, finished as far as it is: what was measured, its files, and what has failed.

    columns, rows: as they fit 80 columns.   notes: what is best, and what the figures depend on.
    pending: rows that still have seeds to run.   document: what compare.json holds.
    failures: of the `asked` rows, by name.   After a dry run there are only the `num_jobs`.
    """

    title: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    pending: Sequence[str] = ()
    paths: Sequence[Path] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[tuple[str, Failure]] = ()
    asked: Sequence[str] = ()
    num_jobs: int = 0


def compare(
    plan: str,
    *,
    run: RunFile | None = None,
    model: str | None = None,
    data: str | None = None,
    only: Sequence[str] = (),
    jobs: int = 1,
    updates: int | None = None,
    budget: str | None = None,
    seeds: Sequence[int] | None = None,
    output: Path | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    table: bool = False, dry_run: bool = False, progress: Progress = silent,
) -> Compared:  # fmt: skip
    """Train and measure every row of a plan, or those that are not finished yet.

    plan: a TOML file, or table1, table2, table3, sensitivity.   model: the base to import, in place
    of that of `run`; without both that of the plan, else digits.   only: names or globs of rows.
    jobs: at a time on this machine; any number of machines that see `output` share them.
    updates: of each row in total.   budget: what rows have in equal amount, updates or compute.
    output: the folder of everything, None for the plan's name.   table: run nothing.   dry_run: say
    what would run, and leave nothing behind.

    Raises ConfigError, MissingError or ArtifactError before anything is trained, Stopped after a
    signal. A row that fails does not keep the others: see `Compared.failures`.
    """
    chosen = _chosen(plan, data, updates=updates, budget=budget, seeds=seeds)
    folder = output or Path(Path(plan).stem)
    with tempfile.TemporaryDirectory() as scratch:
        if dry_run and not folder.exists():
            folder = Path(scratch)
        run, base = base_of(chosen, run or RunFile(), folder / "base", model, progress)

        from deme_cli.comparison.jobs import jobs_of
        from deme_cli.comparison.work import change_of, work_off

        stage, flops = _stage(chosen, run, folder, base, device=device, dtype=dtype)
        rows = jobs_of(chosen, stage)
        asked = _rows_of(rows, only)
        for row in asked:
            if change := change_of(row):
                progress(Step(note=change))
        if not table:
            _check_measures(stage, rows, asked, Path(scratch))
        if dry_run:
            return Compared(num_jobs=_tell_jobs(asked, flops, progress))
        if not table:
            work_off([job for row in asked for job in row.jobs], jobs, progress)
        return _concluded(collect(chosen, rows, flops=flops), stage.folder, asked)


def _chosen(plan: str, data: str | None, **given: Any) -> Plan:
    """The plan with what is asked for in place of its own."""
    given = {name: value for name, value in given.items() if value is not None}
    if "seeds" in given:
        given["seeds"] = tuple(given["seeds"])
    chosen = replace(read_plan(plan), **given)
    if data is None:
        return chosen
    images = {**chosen.tables.get("data", {}), "source": data}
    return replace(chosen, tables={**chosen.tables, "data": images})


def base_of(
    plan: Plan, run: RunFile, place: Path, model: str | None, progress: Progress
) -> tuple[RunFile, Path]:
    """The base that every row starts from, and the `deme.toml` that goes with it.

    That of this folder, unless a model is asked for; else what an earlier run imported into
    `place`; else it is imported there now.
    """
    told = plan.tables.get("model", {})
    if run.path is not None and model is None:
        return run, run.base
    source = model or told.get("source")
    if not (place / CONFIG_NAME).exists():
        from deme_cli.training.split import split

        data = plan.tables.get("data", {}).get("source")
        done = split(
            source or "digits", SplitConfig(n=plan.n), data=data, pipeline=told.get("pipeline"),
            output=place, force=True,
        )  # fmt: skip
        parameters = f"{done.facts['parameters']:,} parameters"
        for note in (*done.facts["notes"], f"{done.record.source}: imported, {parameters}"):
            progress(Step(note=note))
        source = None  # nothing to compare with
    found = read_run_file(place / CONFIG_NAME)
    if source is not None and not _is_of(found, source):
        raise ConfigError(
            f"{place}: made before from {found.tables['model']['source']!r}, not {source!r}; "
            f"choose another --output"
        )
    return found, found.base


def _is_of(run: RunFile, model: str) -> bool:
    """Whether the base of `run` is what `model` names: imported from it, or the same weights."""
    has, path = run.tables["model"]["source"], Path(model)
    if has in (model, str(path.resolve())):
        return True
    return path.is_file() and read_record(path).fingerprint == read_record(run.base).fingerprint


def _stage(
    plan: Plan, run: RunFile, folder: Path, base: Path, *, device: str, dtype: str
) -> tuple[Stage, dict[str, float]]:
    """The stage, with updates as the budget has them, and the FLOPs of an update of each row."""
    from deme_cli.comparison.jobs import (
        flops_by_row,
        open_stage,
        projections_of,
        with_equal_compute,
    )
    from deme_cli.comparison.passes import passes_of

    stage = open_stage(plan, run, folder, base=base, device=device, dtype=dtype)
    passes = passes_of(stage, projections_of(plan, stage.tables))
    if plan.budget == "compute":
        stage = with_equal_compute(plan, stage, passes)
    return stage, flops_by_row(plan, stage, passes)


def _rows_of(rows: Sequence[RowJobs], only: Sequence[str]) -> Sequence[RowJobs]:
    """The rows whose names match. Raises ConfigError for a pattern that matches none."""
    for pattern in only:
        if not any(fnmatchcase(row.row.name, pattern) for row in rows):
            names = ", ".join(repr(row.row.name) for row in rows)
            raise ConfigError(f"--only {pattern!r}: no row of that name; there are {names}")
    wanted = [row for row in rows if any(fnmatchcase(row.row.name, p) for p in only)]
    return wanted if only else rows


def _check_measures(
    stage: Stage, rows: Sequence[RowJobs], asked: Sequence[RowJobs], scratch: Path
) -> None:
    """What an evaluation checks of every measure, before hours of training."""
    from deme_cli.evaluation.evaluate import evaluate

    if all(job.is_done for row in asked for job in row.results.values()):
        return
    one, was_quiet = next(iter(rows[0].results.values())), console.is_quiet()
    console.set_quiet(True)
    try:
        for index, measure in enumerate(stage.measures):
            path = scratch / f"measure-{index}.toml"
            path.write_text(one.files[path.name], encoding="utf-8")
            run = read_run_file(path)
            try:
                evaluate([stage.base], run=run, device=stage.device, dry_run=True)
            except DemeError as error:
                where = f"measure {measure.name!r}" if measure.name else "[eval]"
                raise type(error)(f"{where}: {error}") from error
    finally:
        console.set_quiet(was_quiet)


def _tell_jobs(asked: Sequence[RowJobs], flops: Mapping[str, float], progress: Progress) -> int:
    """Say the jobs of the rows asked for, each once, and what their training costs; their count."""
    seen: set[Path] = set()
    for row in asked:
        cost = ""
        if config := row.finetune:
            per_seed = config.steps * row.row.n * flops[row.row.name] / 1e12
            cost = f": {per_seed:.3g} TFLOP of training per seed"
        progress(Step(note=f"{row.row.name}{cost}"))
        for one in row.jobs:
            if one.folder not in seen:
                words = ", ".join(command.words[0] for command in one.commands)
                progress(Step(note=f"  {one.title}: {'done' if one.is_done else words}"))
            seen.add(one.folder)
    return len(seen)


def _concluded(table: Comparison, folder: Path, asked: Sequence[RowJobs]) -> Compared:
    """Write the table in every form, and the picture where there is something to draw."""
    from deme_cli.comparison.figures import headlines, status_of
    from deme_cli.comparison.picture import draw_comparison
    from deme_cli.comparison.table import csv_text, document, markdown, terminal_rows

    shown = document(table)
    told = json.dumps({"schema_version": console.SCHEMA_VERSION, **shown}, indent=1) + "\n"
    texts = {"md": markdown(table), "csv": csv_text(table), "json": told}
    for suffix, text in texts.items():
        write_whole(folder / f"compare.{suffix}", [text.encode()])
    pictures = ("png", "svg") if table.columns else ()
    for suffix in pictures:
        draw_comparison(table, folder / f"compare.{suffix}")
    troubles = [f"{row.name}: {status_of(row)}" for row in table.rows if row.failures]
    columns, rows = terminal_rows(table)
    return Compared(
        table.title, columns, rows, [*headlines(table), *table.protocol, *troubles],
        [row.name for row in table.rows if row.pending],
        [folder / f"compare.{suffix}" for suffix in (*texts, *pictures)], shown,
        [
            (row.row.name, failure)
            for row in asked for seed in row.results if (failure := row.failure(seed))
        ],
        [row.row.name for row in asked],
    )  # fmt: skip


def collect(plan: Plan, rows: Sequence[RowJobs], *, flops: Mapping[str, float]) -> Comparison:
    """The table as far as it is. flops: of one update, by row.

    Raises ArtifactError where a finished job has left a file that cannot be read, or rows were
    trained or measured on images that are not the same any more.
    """
    from deme_cli.comparison.figures import Comparison

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
    from deme_cli.comparison.figures import Result, RowResult

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
    from deme_cli.comparison.figures import Column, lower_is_better

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
    from deme_cli.comparison.figures import SearchCost

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
                for name, ours, theirs in differences(first, card, first["num"], num) or ():
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
    from deme_cli.evaluation.protocols import describe_cards

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
