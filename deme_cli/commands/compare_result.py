"""What `deme compare` shows and leaves: jobs of a dry run, the table in every form, failures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.errors import DemeError
from deme_cli.outputs import shown_path, write_whole

if TYPE_CHECKING:
    from deme_cli.comparison.jobs import RowJobs, Stage
    from deme_cli.comparison.plan import Plan
    from deme_cli.comparison.results import Comparison


class RowsFailed(DemeError):
    """Rows of the table have no result; carries the exit code of the first that failed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def say_what_would_run(
    rows: Sequence[RowJobs], flops: Mapping[str, float], *, as_json: bool
) -> None:
    """The jobs of these rows, each once, and what their training costs."""
    seen: set[Path] = set()
    for row in rows:
        if config := row.finetune:
            cost = config.steps * row.row.n * flops[row.row.name] / 1e12
            console.note(f"{row.row.name}: {cost:.3g} TFLOP of training per seed")
        else:
            console.note(row.row.name)
        for job in (*row.trainings.values(), *row.results.values()):
            if job.folder not in seen:
                words = ", ".join(command.words[0] for command in job.commands)
                console.note(f"  {job.title}: {'done' if job.is_done else words}")
            seen.add(job.folder)
    console.result_paths([], as_json=as_json, dry_run=True, jobs=len(seen))


def conclude(
    plan: Plan,
    stage: Stage,
    rows: Sequence[RowJobs],
    asked: Sequence[RowJobs],
    flops: Mapping[str, float],
    *,
    as_json: bool,
) -> None:
    """Write the table in every form and show it; raises RowsFailed if a row asked for failed."""
    from deme_cli.comparison.collect import collect
    from deme_cli.comparison.document import document

    comparison = collect(plan, rows, flops=flops)
    shown = document(comparison)
    paths = _write(comparison, shown, stage.folder)
    _tell(comparison)
    console.result_paths([shown_path(path) for path in paths], as_json=as_json, **shown)
    failures = [
        (jobs.row.name, failure)
        for jobs in asked
        for seed in jobs.results
        if (failure := jobs.failure(seed))
    ]
    if failures:
        rows_of: dict[str, list[str]] = {}
        for name, failure in failures:
            rows_of.setdefault(failure.message, []).append(name)
        told = [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in rows_of.items()]
        raise RowsFailed(
            f"{len(dict(failures))} of {len(asked)} rows have failed: {'; '.join(told)}",
            failures[0][1].exit_code,
        )


def _write(comparison: Comparison, shown: Mapping[str, Any], folder: Path) -> list[Path]:
    """compare.md, .csv and .json, and the picture where there is something to draw."""
    from deme_cli.comparison.document import csv_text
    from deme_cli.comparison.picture import draw_comparison
    from deme_cli.comparison.table import markdown

    document = json.dumps({"schema_version": console.SCHEMA_VERSION, **shown}, indent=1) + "\n"
    texts = {"md": markdown(comparison), "csv": csv_text(comparison), "json": document}
    for suffix, text in texts.items():
        write_whole(folder / f"compare.{suffix}", [text.encode()])
    pictures = ("png", "svg") if comparison.columns else ()
    for suffix in pictures:
        draw_comparison(comparison, folder / f"compare.{suffix}")
    return [folder / f"compare.{suffix}" for suffix in (*texts, *pictures)]


def _tell(comparison: Comparison) -> None:
    """The table on the terminal, what may be said of it, and what is missing."""
    from deme_cli.comparison.figures import status_of
    from deme_cli.comparison.readings import readings
    from deme_cli.comparison.table import terminal_rows

    columns, lines = terminal_rows(comparison)
    console.table(comparison.title, columns, lines)
    for line in (*readings(comparison), *comparison.protocol):
        console.note(line)
    for row in comparison.rows:
        if row.failures:
            console.warn(f"{row.name}: {status_of(row)}")
    if pending := [row.name for row in comparison.rows if row.pending]:
        console.note(f"still to come, with the same command: {', '.join(pending)}")
