"""A table of methods under one protocol, every row trained and measured here."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.artifacts import read_record
from deme_cli.comparison.plan import PLAIN, Plan, RowPlan, naming, read_plan
from deme_cli.config import CONFIG_NAME, SplitConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.evaluation.protocols import compare as differences
from deme_cli.evaluation.protocols import describe_cards
from deme_cli.files import write_whole
from deme_cli.run_file import RunFile, read_run_file

if TYPE_CHECKING:
    from deme_cli.comparison.jobs import Failure, Job
    from deme_cli.comparison.stage import Stage
    from deme_cli.comparison.table import Comparison


@dataclass(frozen=True)
class Compared:
    """The table, finished as far as it is: what was measured, its files, and what has failed.

    columns, rows: as they fit a terminal.   notes: what is best, what the figures depend on, what
    is still to come.   document: what compare.json holds.   failures: of the rows asked for. After
    a dry run there are only the `num_jobs`.
    """

    title: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    paths: Sequence[Path] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[tuple[str, Failure]] = ()
    num_jobs: int = 0


def compare(
    plan: str, *, run: RunFile | None = None, model: str | None = None, data: str | None = None,
    only: Sequence[str] = (), jobs: int = 1, updates: int | None = None, budget: str | None = None,
    seeds: Sequence[int] | None = None, output: Path | None = None, device: str = "auto",
    dtype: str = "fp32", table: bool = False, dry_run: bool = False, progress: Progress = silent,
) -> Compared:  # fmt: skip
    """Train and measure every row of a plan, or those that are not finished yet.

    plan: a TOML file, or table1, table2, table3, sensitivity; or the folder of one job of a
    comparison, which alone is done then.   model: the base to import, in place of that of `run`;
    without both that of the plan, else digits.   only: names or globs of rows.   jobs: at a time on
    this machine; any number of machines that see `output` share them.   updates: of each row in
    total.   budget: what rows have in equal amount, updates or compute.   output: the folder of
    everything, None for the plan's name.   table: run nothing.   dry_run: say what would run, and
    leave nothing behind.

    Raises ConfigError, MissingError or ArtifactError before anything is trained, Stopped after a
    signal. A row that fails does not keep the others: see `Compared.failures`.
    """
    if Path(plan, "job.json").is_file():
        from deme_cli.comparison.jobs import do_job

        do_job(Path(plan), progress)
        return Compared(num_jobs=1)
    chosen = _chosen(plan, data, updates=updates, budget=budget, seeds=seeds and list(seeds))
    folder = output or Path(Path(plan).stem)
    with tempfile.TemporaryDirectory() as scratch:
        if dry_run and not folder.exists():
            folder = Path(scratch)
        run = _run_of(chosen, run or RunFile(), folder / "base", model, progress)
        from deme_cli.comparison.jobs import work_off
        from deme_cli.comparison.stage import jobs_of, open_stage

        stage = open_stage(chosen, run, folder, base=run.base, device=device, dtype=dtype)
        rows = jobs_of(stage)
        for pattern in only:
            if not any(fnmatchcase(name, pattern) for name in rows):
                shown = ", ".join(map(repr, rows))
                raise ConfigError(f"--only {pattern!r}: no row of that name; there are {shown}")
        asked = {
            name: list(row.values()) for name, row in rows.items()
            if not only or any(fnmatchcase(name, pattern) for pattern in only)
        }  # fmt: skip
        todo = {
            name: [*(job.needs for job in row if job.needs and not job.is_done), *row]
            for name, row in asked.items()  # without the trainings whose results are there
        }
        every = [job for row in todo.values() for job in row]
        if not table and not all(job.is_done for job in every):
            _check_measures(stage)
        if dry_run:
            seen, by_name = set[Path](), {one.name: one for one in chosen.rows}
            for name, row in todo.items():
                cost = stage.flops(by_name[name]) * stage.updates[name] / 1e12
                told = f": {cost:.3g} TFLOP of training per seed" if cost else ""
                progress(Step(note=f"{name}{told}"))
                for job in [job for job in row if job.folder not in seen]:
                    progress(Step(note=f"  {job.title}: {'done' if job.is_done else 'to do'}"))
                    seen.add(job.folder)
            return Compared(num_jobs=len(seen))
        if not table:
            work_off(every, jobs, progress)
        found, failures = collect(stage, rows), []
        for name, row in asked.items():
            failures += [(name, failure) for job in row if (failure := job.failure)]
        return _concluded(found, stage.folder, failures)


def _chosen(plan: str, data: str | None, **given: Any) -> Plan:
    """The plan with what is asked for in place of its own."""
    chosen = replace(read_plan(plan), **{n: v for n, v in given.items() if v is not None})
    images = {**chosen.tables.get("data", {}), **({"source": data} if data else {})}
    return replace(chosen, tables={**chosen.tables, "data": images})


def _run_of(
    plan: Plan, run: RunFile, place: Path, model: str | None, progress: Progress
) -> RunFile:
    """The base that every row starts from and the settings that go with it: those of this folder,
    unless a model is asked for, which is imported into `place` once."""
    if run.path is not None and model is None:
        return run
    told = plan.tables.get("model", {})
    source = model or told.get("source") or "digits"
    there = str(Path(source).resolve()) if Path(source).exists() else source
    name = hashlib.blake2b(there.encode(), digest_size=4).hexdigest()
    place /= f"{Path(source).stem}-{name}"
    if not (place / CONFIG_NAME).exists():
        from deme_cli.training.split import split

        split(
            source, SplitConfig(n=plan.n), data=plan.tables["data"].get("source"),
            pipeline=told.get("pipeline"), output=place, force=True,
        )  # fmt: skip
        progress(Step(note=f"{source}: imported"))
    return read_run_file(place / CONFIG_NAME)


def _check_measures(stage: Stage) -> None:
    """What an evaluation checks of every measure, before hours of training."""
    from deme_cli.evaluation.evaluate import evaluate

    for one in stage.measures:
        tables = {"model": stage.tables["model"], "sample": one["sample"], "eval": one["eval"]}
        run = RunFile(tables=tables)
        with naming(f"measure {one['name']!r}" if one["name"] else "[eval]"):
            evaluate([stage.base], run=run, device=stage.device, dry_run=True)


def _concluded(
    found: Comparison, folder: Path, failures: Sequence[tuple[str, Failure]]
) -> Compared:
    """Write the table in every form, and the picture where there is something to draw."""
    from deme_cli.comparison.table import columns_of, document, draw, headlines, markdown

    shown = document(found)
    told = json.dumps({"schema_version": console.SCHEMA_VERSION, **shown}, indent=1) + "\n"
    forms = {"md": markdown(found).encode(), "json": told.encode()}
    if found.columns:
        forms |= {"png": draw(found, "png"), "svg": draw(found, "svg")}
    paths = [folder / f"compare.{suffix}" for suffix in forms]
    for path, content in zip(paths, forms.values(), strict=True):
        write_whole(path, [content])
    notes = [*headlines(found), *found.protocol]
    notes += [f"{row.name}: {row.state}" for row in found.rows if row.failures]
    if pending := ", ".join(row.name for row in found.rows if row.pending):
        notes.append(f"still to come, with the same command: {pending}")
    headings, cells = zip(*columns_of(found, brief=True), strict=True)
    lines = list(zip(*cells, strict=True))
    return Compared(found.title, headings, lines, notes, paths, shown, failures)


def collect(stage: Stage, rows: Mapping[str, Mapping[int | None, Job]]) -> Comparison:
    """The table as far as it is.

    Raises ArtifactError where a finished job has left a file that cannot be read, or rows were
    trained or measured on images that are not the same any more.
    """
    from deme_cli.comparison.table import Column, Comparison, Result, Row

    plan, columns, cards = stage.plan, dict[Column, None](), dict[str, Any]()
    images, found = dict[str, Any](), []

    def require_same(path: Path, name: str, theirs: Any, ours: Any) -> None:
        if theirs != ours:
            raise ArtifactError(
                f"{path}: made with {name} = {theirs}, other rows with {ours}; remove its folder, "
                f"and it is made again, or choose another --output"
            )

    for row in plan.rows:
        jobs, results = rows[row.name], []
        for seed, job in jobs.items():
            if not job.is_done:
                continue
            values, merged = {}, job.folder / "merged.safetensors"
            for measure, name in zip(plan.measures, job.outputs, strict=True):
                metrics, card = _measured(job.folder / name)
                first = cards.setdefault(measure.name, card)
                for key, ours, theirs in differences(first, card, first["num"], card["num"]) or ():
                    if key != "versions":
                        require_same(job.folder / name, key, theirs, ours)
                for metric, numbers in metrics.items():
                    columns[column := Column(metric, measure.name)] = None
                    values[column.title] = numbers
            if job.needs and (expert := job.needs.folder / job.needs.outputs[-1]).exists():
                data = read_record(expert, "expert").data
                images = images or data
                require_same(expert, "images", data, images)
            result = Result(seed, values, _seconds(job.needs))
            if merged.exists():
                record = read_record(merged, "merged")
                search = record.search and _search_cost(record.search)
                result = replace(result, coefficients=record.coefficients, search=search)
            results.append(result)
        failures = [failure.message for job in jobs.values() if (failure := job.failure)]
        found.append(Row(
            row.name, row.kind, results=results, published=row.published, failures=failures,
            pending=len(jobs) - len(results) - len(failures), **_training_of(row, stage),
        ))  # fmt: skip
    equal = "as many updates" if plan.budget == "updates" else "as many training FLOPs"
    protocol = [
        f"every row that trains: {equal} (in whole updates of each range), the same images, and "
        f"training seeds {', '.join(map(str, plan.seeds))}; all rows are drawn from the same noise"
    ]
    for name, card in cards.items():
        lines = [*describe_cards({"every row": card}),
                 f"{card['num']:,} images of every row and evaluation seed"]  # fmt: skip
        protocol += [f"{name}: {line}" if name else line for line in lines]
    return Comparison(plan.title, list(columns), found, protocol, plan.published, cards)


def _measured(path: Path) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The values by metric, and the protocol card with the number of images."""
    try:
        (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
        metrics = {name: figure["values"] for name, figure in row["metrics"].items()}
        return metrics, {**row["protocol"], "num": next(iter(row["metrics"].values()))["n"]}
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error}); remove its folder, and the row is measured again"
        ) from error


def _training_of(row: RowPlan, stage: Stage) -> dict[str, Any]:
    """What a row's training takes, and what sets the row apart."""
    if row.kind == "base":
        return {}
    config, apart = stage.finetune(row), dict(row.finetune)
    if row.kind != "finetune":
        apart = {**{name: getattr(config, name) for name in PLAIN}, **apart, "by": row.by}
    if row.kind == "merged":
        apart |= {"search": stage.merge(row).search, **row.merge}
    updates = row.n * config.steps
    return {
        "num_ranges": row.n, "updates": updates, "flops": updates * stage.flops(row),
        "images": updates * config.batch_size * config.accumulation, "settings": apart,
    }  # fmt: skip


def _seconds(job: Job | None) -> float:
    """Seconds in the training loops of a job, from the rates that its curves tell.

    A line that a kill has torn is passed over.
    """
    if job is None:
        return 0.0
    config, seconds = job.task["tables"]["finetune"], 0.0
    size = config["batch_size"] * config["accumulation"]
    for curve in job.curves:
        step = 0
        for line in curve.read_text().splitlines() if curve.exists() else ():
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                rate, images = record["images_per_second"], (record["step"] - step) * size
                seconds, step = seconds + images / rate, record["step"]
    return seconds


def _search_cost(search: Mapping[str, Any]) -> dict[str, Any]:
    """What the search of coefficients took, besides training."""
    images = [one["evaluations"] * one["num"] for one in search.get("rungs", [])
              if not one["objective"].startswith(("loss", "experts"))]  # fmt: skip
    told = {name: search[name] for name in ("evaluations", "seconds", "objective")}
    return {**told, "images": sum(images)}
