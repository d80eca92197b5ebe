"""`compare`: a table of methods under one protocol, every row trained and measured here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.comparison_base import base_of
from deme_cli.errors import ConfigError, DemeError
from deme_cli.files import write_whole
from deme_cli.run_file import RunFile, read_run_file

if TYPE_CHECKING:
    from deme_cli.comparison.jobs import Failure, RowJobs, Stage
    from deme_cli.comparison.plan import Plan
    from deme_cli.comparison.results import Comparison


@dataclass(frozen=True)
class Compared:
    """The table, finished as far as it is: what was measured, its files, and what has failed.

    document: what compare.json holds.   failures: of the rows that were asked for, by name.
    """

    table: Comparison
    paths: Sequence[Path]
    document: Mapping[str, Any]
    failures: Sequence[tuple[str, Failure]]

    def columns_and_rows(self) -> tuple[list[str], list[list[str]]]:
        """The table as it fits 80 columns."""
        from deme_cli.comparison.table import terminal_rows

        return terminal_rows(self.table)

    def readings(self) -> list[str]:
        """What may be said of the table."""
        from deme_cli.comparison.readings import readings

        return list(readings(self.table))

    def troubles(self) -> list[str]:
        """Why rows have no result, or not all of it."""
        from deme_cli.comparison.figures import status_of

        return [f"{row.name}: {status_of(row)}" for row in self.table.rows if row.failures]


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
) -> Compared:
    """Train and measure every row of a plan, or those that are not finished yet.

    plan: a TOML file, or table1, table2, table3, sensitivity.   model: the base to import, in place
    of that of `run`; without both that of the plan, else digits.   only: names or globs of rows.
    jobs: at a time on this machine; any number of machines that see `output` share them.
    updates: of each row in total.   budget: what rows have in equal amount, updates or compute.
    output: the folder of everything, None for the plan's name.

    Raises ConfigError, MissingError or ArtifactError before anything is trained. A row that fails
    does not keep the others: see `Compared.failures`.
    """
    with open_comparison(
        plan, run or RunFile(), model=model, data=data, only=only, updates=updates, budget=budget,
        seeds=seeds, output=output, device=device, dtype=dtype,
    ) as job:  # fmt: skip
        job.check_measures()
        job.work_off(jobs)
        return job.conclude()


@contextmanager
def open_comparison(
    plan: str,
    run: RunFile,
    *,
    model: str | None,
    data: str | None,
    only: Sequence[str],
    updates: int | None,
    budget: str | None,
    seeds: Sequence[int] | None,
    output: Path | None,
    device: str,
    dtype: str,
    leaves_nothing: bool = False,
) -> Iterator[ComparisonJob]:
    """The jobs of a plan, its base imported. See `compare`.

    leaves_nothing: work in a folder that goes afterwards, unless there is one already.
    """
    from deme_cli.comparison.jobs import jobs_of
    from deme_cli.comparison.plan import read_plan

    given: dict[str, Any] = {
        "updates": updates,
        "budget": budget,
        "seeds": None if seeds is None else tuple(seeds),
    }
    chosen = replace(read_plan(plan), **{k: v for k, v in given.items() if v is not None})
    if data is not None:
        images = {**chosen.tables.get("data", {}), "source": data}
        chosen = replace(chosen, tables={**chosen.tables, "data": images})
    folder = output or Path(Path(plan).stem)
    with tempfile.TemporaryDirectory() as scratch:
        if leaves_nothing and not folder.exists():
            folder = Path(scratch)
        run, base = base_of(chosen, run, folder / "base", model=model)
        stage, flops = _stage(chosen, run, folder, base, device=device, dtype=dtype)
        rows = jobs_of(chosen, stage)
        job = ComparisonJob(chosen, stage, rows, _rows_of(rows, only), flops, Path(scratch))
        job.tell_changes()
        yield job


@dataclass(frozen=True)
class ComparisonJob:
    """A plan with its base: the jobs of all rows, and of those `asked` for.

    flops: of an update of each row.
    """

    plan: Plan
    stage: Stage
    rows: Sequence[RowJobs]
    asked: Sequence[RowJobs]
    flops: Mapping[str, float]
    scratch: Path

    def tell_changes(self) -> None:
        """Say which rows were finished with other settings before, and which those are."""
        from deme_cli.comparison.changes import change_of

        for row in self.asked:
            if change := change_of(row):
                console.warn(change)

    def check_measures(self) -> None:
        """What an evaluation checks of every measure, before hours of training."""
        from deme_cli.api.eval_request import resolve_order
        from deme_cli.api.evaluating import EvaluationJob
        from deme_cli.config import EvalConfig

        if all(job.is_done for row in self.asked for job in row.results.values()):
            return
        one, was_quiet = next(iter(self.rows[0].results.values())), console.is_quiet()
        console.set_quiet(True)
        try:
            for index, measure in enumerate(self.stage.measures):
                path = self.scratch / f"measure-{index}.toml"
                path.write_text(one.files[path.name], encoding="utf-8")
                run = read_run_file(path)
                try:
                    nothing = dict.fromkeys(item.name for item in fields(EvalConfig))
                    order = resolve_order(run, nothing, {}, None)
                    models, device = [str(self.stage.base)], self.stage.device
                    EvaluationJob(order, models, run.pipeline(), device, "fp32", "auto").open()
                except DemeError as error:
                    where = f"measure {measure.name!r}" if measure.name else "[eval]"
                    raise type(error)(f"{where}: {error}") from error
        finally:
            console.set_quiet(was_quiet)

    def work_off(self, at_once: int) -> None:
        """Run the jobs of the rows asked for, with a bar."""
        from deme_cli.comparison.work import Finished, Work

        jobs = [job for row in self.asked for job in row.jobs]
        work = Work(jobs, at_once=at_once)
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

    def conclude(self) -> Compared:
        """Write the table in every form, and the picture where there is something to draw."""
        from deme_cli.comparison.collect import collect
        from deme_cli.comparison.document import csv_text, document
        from deme_cli.comparison.picture import draw_comparison
        from deme_cli.comparison.table import markdown

        table = collect(self.plan, self.rows, flops=self.flops)
        shown, folder = document(table), self.stage.folder
        told = json.dumps({"schema_version": console.SCHEMA_VERSION, **shown}, indent=1) + "\n"
        texts = {"md": markdown(table), "csv": csv_text(table), "json": told}
        for suffix, text in texts.items():
            write_whole(folder / f"compare.{suffix}", [text.encode()])
        pictures = ("png", "svg") if table.columns else ()
        for suffix in pictures:
            draw_comparison(table, folder / f"compare.{suffix}")
        paths = [folder / f"compare.{suffix}" for suffix in (*texts, *pictures)]
        return Compared(table, paths, shown, self._failures())

    def _failures(self) -> list[tuple[str, Failure]]:
        return [
            (row.row.name, failure)
            for row in self.asked
            for seed in row.results
            if (failure := row.failure(seed))
        ]


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


def _rows_of(rows: Sequence[RowJobs], only: Sequence[str]) -> Sequence[RowJobs]:
    """The rows whose names match. Raises ConfigError for a pattern that matches none."""
    for pattern in only:
        if not any(fnmatchcase(row.row.name, pattern) for row in rows):
            names = ", ".join(repr(row.row.name) for row in rows)
            raise ConfigError(f"--only {pattern!r}: no row of that name; there are {names}")
    wanted = [row for row in rows if any(fnmatchcase(row.row.name, p) for p in only)]
    return wanted if only else rows
