"""`deme report`: one HTML file of what lies in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.commands.options import Force, Json, Quiet
from deme_cli.errors import ConfigError
from deme_cli.outputs import require_output, write_whole

if TYPE_CHECKING:
    from deme_cli.reporting.page import Report

REPORT_NAME = "report.html"


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
    """Make one HTML file of a run folder: tables, protocols, curves, search, figures, commands.

    It holds everything inside, opens without a network, and runs no script.

    Example: deme report --title "Digits, four experts"
    """
    from deme_cli.reporting.folder import open_folder

    console.set_quiet(quiet)
    target = output or folder / REPORT_NAME
    if target.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output {target}: expected a name that ends in .html")
    found = open_folder(folder)
    require_output(target, force=force)

    from deme_cli.commands.report_lines import command_lines
    from deme_cli.reporting.page import gather, render
    from deme_cli.reporting.summary import counts_of

    page = gather(found, title=title, commands=command_lines(found))
    content = render(page)
    write_whole(target, [content])
    console.note(f"{folder}: {counts_of(found) or 'no artifacts'}; {_sections(page)}")
    for one in page.missing:
        console.note(f"not there: {one.what} ({one.command})")
    for file in page.unread:
        console.warn(f"{file.name}: not shown: {file.reason}")
    console.result_paths(
        [target], as_json=as_json, bytes=len(content), sections=page.counts,
        missing=[{"what": one.what, "command": one.command} for one in page.missing],
        unread=[{"name": one.name, "reason": one.reason} for one in page.unread],
    )  # fmt: skip


def _sections(page: Report) -> str:
    """How many tables, curves and so on the page has."""
    told = {
        "tables": "table", "curves": "curve", "searches": "merge", "figures": "figure",
        "samples": "sample grid", "pictures": "other picture", "commands": "command",
    }  # fmt: skip
    counts = page.counts
    shown = [f"{counts[k]} {name}{'s' * (counts[k] != 1)}" for k, name in told.items() if counts[k]]
    return f"the page has {', '.join(shown)}" if shown else "the page has artifacts alone"
