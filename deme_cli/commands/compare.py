"""`deme compare`: a table of methods under one protocol, every row trained and measured here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.commands.options import ConfigPath, Device, DryRun, Dtype, Json, Quiet, begin
from deme_cli.errors import ConfigError, DemeError
from deme_cli.files import shown_path

if TYPE_CHECKING:
    from deme_cli import Compared

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
    import deme_cli

    run = begin(config, quiet=quiet)
    if model is not None and run.path is not None:
        if config is not None:
            raise ConfigError("--model takes another base than --config has; give one of them")
        console.warn(f"--model {model}: the {run.path} here is not used")
    with console.showing() as progress:
        made = deme_cli.compare(
            plan, run=run, model=model, data=data, only=only or (), jobs=jobs, updates=updates,
            budget=budget, seeds=_parse_seeds(seeds), output=output, device=device, dtype=dtype,
            table=table, dry_run=dry_run, progress=progress,
        )  # fmt: skip
    if dry_run:
        console.result_paths([], as_json=as_json, dry_run=True, jobs=made.num_jobs)
    else:
        _tell(made, as_json=as_json)


def _tell(made: Compared, *, as_json: bool) -> None:
    """The table, what is best in it, and what is missing.

    Raises RowsFailed if a row asked for has failed.
    """
    console.table(made.title, made.columns, made.rows)
    for line in made.notes:
        console.note(line)
    if made.pending:
        console.note(f"still to come, with the same command: {', '.join(made.pending)}")
    paths = [shown_path(path) for path in made.paths]
    console.result_paths(paths, as_json=as_json, **made.document)
    rows_of: dict[str, list[str]] = {}
    for name, failure in made.failures:
        rows_of.setdefault(failure.message, []).append(name)
    if rows_of:
        told = [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in rows_of.items()]
        raise RowsFailed(
            f"{len(dict(made.failures))} of {len(made.asked)} rows have failed: {'; '.join(told)}",
            made.failures[0][1].exit_code,
        )


class RowsFailed(DemeError):
    """Rows of the table have no result; carries the exit code of the first that failed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _parse_seeds(text: str | None) -> list[int] | None:
    if text is not None and not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise ConfigError(f"--seeds {text!r}: expected whole numbers, as in 0,1,2")
    return None if text is None else [int(seed) for seed in text.split(",")]
