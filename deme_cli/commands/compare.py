"""`deme compare`: a table of methods under one protocol, every row trained and measured here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.options import ConfigPath, Device, DryRun, Dtype, Json, Quiet, begin
from deme_cli.errors import ConfigError, DemeError
from deme_cli.files import shown_path

if TYPE_CHECKING:
    from deme_cli import Compared

_MODEL = r"Base to import [default: that of the deme.toml here, else of the plan, else digits]."
_UPDATES = "Updates per row in total [default: n times steps of deme.toml]."
_OUTPUT = "Folder of everything [default: the plan's name]."


def _option(flags: str, text: str, panel: str | None = None, least: int | None = None) -> Any:
    return typer.Option(
        *flags.split(), help=text.replace("[", r"\["), rich_help_panel=panel, min=least,
        show_default=False,
    )  # fmt: skip


def compare(
    plan: Annotated[
        str,
        typer.Argument(
            metavar="PLAN",
            help="A TOML file, table1, table2, table3, sensitivity; or a job's folder.",
        ),
    ],
    model: Annotated[str | None, _option("--model", _MODEL)] = None,
    data: Annotated[str | None, _option("--data", "Training images, as for split.")] = None,
    only: Annotated[
        list[str] | None, _option("--only", "Work on this row alone, a name or glob (repeatable).")
    ] = None,
    jobs: Annotated[int, _option("--jobs", "Jobs at a time on this machine.", least=1)] = 1,
    table: Annotated[
        bool, _option("--table", "Run nothing: the table of what is finished.")
    ] = False,
    updates: Annotated[int | None, _option("--updates", _UPDATES, "Budget", least=1)] = None,
    budget: Annotated[
        str | None,
        _option("--budget", "What rows have in equal amount: updates or compute.", "Budget"),
    ] = None,
    seeds: Annotated[
        str | None,
        _option("--seeds", "Training seeds, as 0,1,2 [default: of the plan].", "Budget"),
    ] = None,
    output: Annotated[Path | None, _option("--output -o", _OUTPUT)] = None,
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
    """
    import deme_cli

    run = begin(config, quiet=quiet)
    if model is not None and run.path is not None:
        if config is not None:
            raise ConfigError("--model takes another base than --config has; give one of them")
        console.warn(f"--model {model}: the {run.path} here is not used")
    if seeds is not None and not re.fullmatch(r"[0-9]+(,[0-9]+)*", seeds):
        raise ConfigError(f"--seeds {seeds!r}: expected whole numbers, as in 0,1,2")
    with console.showing() as progress:
        made = deme_cli.compare(
            plan, run=run, model=model, data=data, only=only or (), jobs=jobs, updates=updates,
            budget=budget, seeds=[int(seed) for seed in seeds.split(",")] if seeds else None,
            output=output, device=device, dtype=dtype, table=table, dry_run=dry_run,
            progress=progress,
        )  # fmt: skip
    if dry_run:
        console.result_paths([], as_json=as_json, dry_run=True, jobs=made.num_jobs)
    elif made.document:
        _tell(made, as_json=as_json)


def _tell(made: Compared, *, as_json: bool) -> None:
    """The table, what is best in it, and what is missing.

    Raises RowsFailed if a row asked for has failed.
    """
    console.table(made.title, made.columns, made.rows)
    for line in made.notes:
        console.note(line)
    paths = [shown_path(path) for path in made.paths]
    console.result_paths(paths, as_json=as_json, **made.document)
    if made.failures:
        rows_of: dict[str, list[str]] = {}
        for name, failure in made.failures:
            rows_of.setdefault(failure.message, []).append(name)
        told = [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in rows_of.items()]
        raise RowsFailed(f"rows that have failed: {'; '.join(told)}", made.failures[0][1].exit_code)


class RowsFailed(DemeError):
    """Rows of the table have no result; carries the exit code of the first that failed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
