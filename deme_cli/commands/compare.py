"""`deme compare`: a table of methods under one protocol, every row trained and measured here."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.options import ConfigPath, Device, DryRun, Dtype, Json, Quiet, begin
from deme_cli.errors import ConfigError, DemeError

if TYPE_CHECKING:
    from deme_cli.comparison.jobs import RowJobs, Stage
    from deme_cli.comparison.plan import Plan
    from deme_cli.run_file import RunFile

_BUDGET = "Budget"


def compare(
    plan: Annotated[
        str,
        typer.Argument(metavar="PLAN", help="A TOML file, or table1, table2, table3, sensitivity."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Base to import, in place of the deme.toml here "
            r"\[default: that of deme.toml, else of the plan, else digits].",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Training images, as for split.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="ROW",
            help="Work on these rows alone (a name or glob; repeatable).",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Jobs at a time on this machine.", min=1)] = 1,
    table: Annotated[
        bool, typer.Option("--table", help="Run nothing: the table of what is finished.")
    ] = False,
    updates: Annotated[
        int | None,
        typer.Option(
            "--updates",
            help="Updates per row in total [default: n times steps of deme.toml].",
            rich_help_panel=_BUDGET,
            min=1,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="What rows have in equal amount: updates or compute.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            help=r"Training seeds, as 0,1,2 \[default: of the plan].",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help=r"Folder of everything \[default: the plan's name].",
            show_default=False,
        ),
    ] = None,
    config: ConfigPath = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train and measure every row of a plan under one protocol; ends in a table and a picture.

    Run it again to go on, here or on any machine that sees the folder: each
    takes the next free job, and what is finished stays.

    Example: deme compare table1 --jobs 2
    """  # fmt: skip
    from deme_cli.commands.compare_result import conclude, say_what_would_run
    from deme_cli.comparison.jobs import jobs_of
    from deme_cli.comparison.plan import read_plan

    run = begin(config, quiet=quiet)
    if model is not None and run.path is not None:
        if config is not None:
            raise ConfigError("--model takes another base than --config has; give one of them")
        console.warn(f"--model {model}: the {run.path} here is not used")
    chosen = _with_options(read_plan(plan), updates=updates, budget=budget, seeds=seeds)
    folder = output or Path(Path(plan).stem)
    with tempfile.TemporaryDirectory() as scratch:
        is_new = dry_run and not folder.exists()
        folder = Path(scratch) if is_new else folder  # a dry run leaves nothing behind
        run, base = _base(chosen, run, folder / "base", model=model, data=data)
        stage, flops = _stage(chosen, run, folder, base, device=device, dtype=dtype)
        rows = jobs_of(chosen, stage)
        asked = _rows_of(rows, only)
        _tell_changes(asked)
        if not table and not all(job.is_done for row in asked for job in row.results.values()):
            _check_measures(stage, rows[0], Path(scratch))
        if dry_run:
            say_what_would_run(asked, flops, as_json=as_json)
            return
        if not table:
            _work_off(asked, jobs)
        conclude(chosen, stage, rows, asked, flops, as_json=as_json)


def _with_options(
    plan: Plan, *, updates: int | None, budget: str | None, seeds: str | None
) -> Plan:
    given: dict[str, Any] = {"updates": updates, "budget": budget}
    if seeds is not None:
        if not re.fullmatch(r"[0-9]+(,[0-9]+)*", seeds):
            raise ConfigError(f"--seeds {seeds!r}: expected whole numbers, as in 0,1,2")
        given["seeds"] = tuple(map(int, seeds.split(",")))
    return replace(plan, **{name: value for name, value in given.items() if value is not None})


def _base(
    plan: Plan, run: RunFile, place: Path, *, model: str | None, data: str | None
) -> tuple[RunFile, Path]:
    """The base that every row starts from, and the `deme.toml` that goes with it.

    That of this folder, unless a model is asked for; else what an earlier run imported into
    `place`; else it is imported there now.
    """
    from deme_cli.config import CONFIG_NAME
    from deme_cli.run_file import read_run_file

    told = plan.tables.get("model", {})
    if run.path is not None and model is None:
        return _with_data(run, data), run.base
    source = model or told.get("source")
    if not (place / CONFIG_NAME).exists():
        given = data or plan.tables.get("data", {}).get("source")
        _import(source or "digits", given, told.get("pipeline"), plan.n, place)
        source = None  # nothing to compare with
    found = read_run_file(place / CONFIG_NAME)
    if source is not None and not _is_of(found, source):
        raise ConfigError(
            f"{place}: made before from {found.tables['model']['source']!r}, not {source!r}; "
            f"choose another --output"
        )
    return _with_data(found, data), found.base


def _with_data(run: RunFile, data: str | None) -> RunFile:
    """The run file with other images, where they were asked for."""
    if data is None:
        return run
    images = {**run.tables.get("data", {}), "source": data}
    return replace(run, tables={**run.tables, "data": images})


def _is_of(run: RunFile, model: str) -> bool:
    """Whether the base of `run` is what `model` names: imported from it, or the same weights."""
    from deme_cli.artifacts import read_record

    has, path = run.tables["model"]["source"], Path(model)
    if has in (model, str(path.resolve())):
        return True
    return path.is_file() and read_record(path).fingerprint == read_record(run.base).fingerprint


def _import(source: str, data: str | None, pipeline: str | None, n: int, place: Path) -> None:
    """`deme split`, with its results shown to the person who watches."""
    from deme_cli.commands.split import split

    was_quiet = console.is_quiet()
    with contextlib.redirect_stdout(io.StringIO()):
        split(
            source, n=n, data=data, by=None, pipeline=pipeline, output=place, force=True,
            quiet=was_quiet,
        )  # fmt: skip
    console.set_quiet(was_quiet)


def _stage(
    plan: Plan, run: RunFile, folder: Path, base: Path, *, device: str, dtype: str
) -> tuple[Stage, dict[str, float]]:
    """The stage, with updates as the budget has them, and the FLOPs of an update of each row."""
    from deme_cli.comparison.passes import passes_of
    from deme_cli.comparison.stage import (
        flops_by_row,
        open_stage,
        projections_of,
        with_equal_compute,
    )

    stage = open_stage(plan, run, folder, base=base, device=device, dtype=dtype)
    passes = passes_of(stage, projections_of(plan, stage.tables))
    if plan.budget == "compute":
        stage = with_equal_compute(plan, stage, passes)
    return stage, flops_by_row(plan, stage, passes)


def _check_measures(stage: Stage, row: RowJobs, scratch: Path) -> None:
    """What `deme eval --dry-run` checks of every measure, before hours of training."""
    from deme_cli.commands.eval import evaluate

    job, was_quiet = next(iter(row.results.values())), console.is_quiet()
    for index, measure in enumerate(stage.measures):
        path = scratch / f"measure-{index}.toml"
        path.write_text(job.files[path.name], encoding="utf-8")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                evaluate(
                    [str(stage.base)], config=path, dry_run=True, quiet=True, device=stage.device
                )
        except DemeError as error:
            where = f"measure {measure.name!r}" if measure.name else "[eval]"
            raise type(error)(f"{where}: {error}") from error
        finally:
            console.set_quiet(was_quiet)


def _rows_of(rows: list[RowJobs], only: list[str] | None) -> list[RowJobs]:
    """The rows whose names match. Raises ConfigError for a pattern that matches none."""
    if not only:
        return rows
    for pattern in only:
        if not any(fnmatchcase(row.row.name, pattern) for row in rows):
            names = ", ".join(repr(row.row.name) for row in rows)
            raise ConfigError(f"--only {pattern!r}: no row of that name; there are {names}")
    return [row for row in rows if any(fnmatchcase(row.row.name, p) for p in only)]


def _tell_changes(rows: list[RowJobs]) -> None:
    """Say which rows were finished with other settings before, and which those are."""
    from deme_cli.comparison.changes import change_of

    for row in rows:
        if change := change_of(row):
            console.warn(change)


def _work_off(rows: list[RowJobs], at_once: int) -> None:
    """Run the jobs of these rows with a bar."""
    from deme_cli.comparison.work import Finished, Work

    work = Work(
        [job for row in rows for job in (*row.trainings.values(), *row.results.values())],
        at_once=at_once,
    )
    with console.progress("comparison", len(work.jobs), "job") as bar:
        for record in work.run():
            if isinstance(record, Finished):
                outcome = f"FAILED: {record.failure.message}" if record.failure else "done"
                bar.say(f"{record.job.title}: {outcome}, {record.seconds:.0f} s")
            else:
                done = sum(record.running.values())
                trained = f", {done}/{record.updates} updates" if record.updates else ""
                bar.advance(record.settled, f"{len(record.running)} running{trained}")
        bar.advance(work.num_settled)
