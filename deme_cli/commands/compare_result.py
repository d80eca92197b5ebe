"""What `deme compare` shows: the jobs of a dry run, the table, what has failed."""

from __future__ import annotations

from pathlib import Path

from deme_cli import console
from deme_cli.api.comparing import Compared, ComparisonJob
from deme_cli.errors import DemeError
from deme_cli.files import shown_path


class RowsFailed(DemeError):
    """Rows of the table have no result; carries the exit code of the first that failed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def say_what_would_run(job: ComparisonJob, *, as_json: bool) -> None:
    """The jobs of the rows asked for, each once, and what their training costs."""
    seen: set[Path] = set()
    for row in job.asked:
        if config := row.finetune:
            cost = config.steps * row.row.n * job.flops[row.row.name] / 1e12
            console.note(f"{row.row.name}: {cost:.3g} TFLOP of training per seed")
        else:
            console.note(row.row.name)
        for one in row.jobs:
            if one.folder not in seen:
                words = ", ".join(command.words[0] for command in one.commands)
                console.note(f"  {one.title}: {'done' if one.is_done else words}")
            seen.add(one.folder)
    console.result_paths([], as_json=as_json, dry_run=True, jobs=len(seen))


def tell(job: ComparisonJob, compared: Compared, *, as_json: bool) -> None:
    """The table, what may be said of it, and what is missing.

    Raises RowsFailed if a row asked for has failed.
    """
    table = compared.table
    console.table(table.title, *compared.columns_and_rows())
    for line in (*compared.readings(), *table.protocol):
        console.note(line)
    for line in compared.troubles():
        console.warn(line)
    if pending := [row.name for row in table.rows if row.pending]:
        console.note(f"still to come, with the same command: {', '.join(pending)}")
    paths = [shown_path(path) for path in compared.paths]
    console.result_paths(paths, as_json=as_json, **compared.document)
    rows_of: dict[str, list[str]] = {}
    for name, failure in compared.failures:
        rows_of.setdefault(failure.message, []).append(name)
    if rows_of:
        told = [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in rows_of.items()]
        raise RowsFailed(
            f"{len(dict(compared.failures))} of {len(job.asked)} rows have failed: "
            f"{'; '.join(told)}",
            compared.failures[0][1].exit_code,
        )
