"""`deme report`: one HTML file of what lies in a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.api import reporting
from deme_cli.api.reporting import REPORT_NAME
from deme_cli.commands.options import Force, Json, Quiet


def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="The folder that deme worked in."),
    ] = Path("."),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help=rf"HTML file to write \[default: {REPORT_NAME} in FOLDER].",
            show_default=False,
        ),
    ] = None,
    title: Annotated[
        str | None,
        typer.Option(
            "--title", help=r"Title of the page \[default: the folder's name].", show_default=False
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make one HTML file of a run folder: tables, protocols, curves, search, figures, samples.

    It holds everything inside, opens without a network, and runs no script.

    Example: deme report --title "Digits, four experts"
    """
    console.set_quiet(quiet)
    made = reporting.report(folder, output=output, title=title, force=force)
    page = made.page
    console.note(f"{folder}: {made.artifacts or 'no artifacts'}; {_sections(page.counts)}")
    for one in page.missing:
        console.note(f"not there: {one.what} ({one.command})")
    for file in page.unread:
        console.warn(f"{file.name}: not shown: {file.reason}")
    console.result_paths(
        [made.path], as_json=as_json, bytes=made.num_bytes, sections=page.counts,
        missing=[{"what": one.what, "command": one.command} for one in page.missing],
        unread=[{"name": one.name, "reason": one.reason} for one in page.unread],
    )  # fmt: skip


def _sections(counts: Mapping[str, int]) -> str:
    """How many tables, curves and so on the page has."""
    told = {
        "tables": "table", "curves": "curve", "searches": "merge", "figures": "figure",
        "samples": "sample grid", "pictures": "other picture",
    }  # fmt: skip
    shown = [f"{counts[k]} {name}{'s' * (counts[k] != 1)}" for k, name in told.items() if counts[k]]
    return f"the page has {', '.join(shown)}" if shown else "the page has artifacts alone"
