"""`deme compare`: a table of methods under one protocol, every row trained and measured here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.commands.options import Given, argument, command, flag
from deme_cli.config import CONFIG_NAME
from deme_cli.errors import ConfigError, DemeError
from deme_cli.files import shown_path


@command("config device dtype dry_run")
def compare(
    plan: Annotated[str, argument(
        "PLAN", "A TOML file, table1, table2, table3, sensitivity; or a job's folder."
    )],
    common: Given,
    model: Annotated[str | None, flag(
        "--model", "Base to import [default: that of the deme.toml here, else of the plan, else "
        "digits].",
    )] = None,
    data: Annotated[str | None, flag("--data", "Training images, as for split.")] = None,
    only: Annotated[
        list[str] | None, flag("--only", "Work on this row alone, a name or glob (repeatable).")
    ] = None,
    jobs: Annotated[int, flag("--jobs", "Jobs at a time on this machine.", min=1)] = 1,
    table: Annotated[bool, flag("--table", "Run nothing: the table of what is finished.")] = False,
    updates: Annotated[int | None, flag(
        "--updates", "Updates per row in total [default: n times steps of deme.toml].", "Budget",
        min=1,
    )] = None,
    budget: Annotated[
        str | None,
        flag("--budget", "What rows have in equal amount: updates or compute.", "Budget"),
    ] = None,
    seeds: Annotated[
        str | None, flag("--seeds", "Training seeds, as 0,1,2 [default: of the plan].", "Budget")
    ] = None,
    output: Annotated[
        Path | None, flag("--output -o", "Folder of everything [default: the plan's name].")
    ] = None,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Train and measure every row of a plan under one protocol; ends in a table and a picture.

    Run it again to go on, here or on any machine that sees the folder: each
    takes the next free job, and what is finished stays.

    Example: deme compare table1 --jobs 2
    """
    run = common["run"]
    if model is not None and run.path is not None:
        if run.path != Path(CONFIG_NAME):
            raise ConfigError("--model takes another base than --config has; give one of them")
        console.warn(f"--model {model}: the {run.path} here is not used")
    if seeds is not None and not re.fullmatch(r"[0-9]+(,[0-9]+)*", seeds):
        raise ConfigError(f"--seeds {seeds!r}: expected whole numbers, as in 0,1,2")
    with console.showing() as progress:
        made = deme_cli.compare(
            plan, model=model, data=data, only=only or (), jobs=jobs, updates=updates,
            budget=budget, seeds=[int(seed) for seed in seeds.split(",")] if seeds else None,
            output=output, table=table, progress=progress, **common,
        )  # fmt: skip
    if common["dry_run"]:
        console.result_paths([], as_json=as_json, dry_run=True, jobs=made.num_jobs)
        return
    if not made.document:
        return
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
        exit_code = made.failures[0][1].exit_code  # of the first
        raise DemeError(f"rows that have failed: {'; '.join(told)}", exit_code=exit_code)
