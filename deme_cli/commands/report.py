"""`deme report`: one HTML file of what lies in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.commands.options import Force, Json, Quiet

_OUTPUT = r"HTML file to write \[default: report.html in FOLDER]."
_TITLE = r"Title of the page \[default: the folder's name]."
_ONE = {"searches": "search"}


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder that deme worked in.")
    ] = Path("."),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=_OUTPUT, show_default=False)
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help=_TITLE, show_default=False)] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make one HTML file of a run folder: tables, protocols, curves, search, figures, samples.

    It holds everything inside, opens without a network, and runs no script.

    Example: deme report --title "Digits, four experts"
    """
    import deme_cli

    console.set_quiet(quiet)
    made = deme_cli.report(folder, output=output, title=title, force=force)
    counts = {name: count for name, count in made.counts.items() if count}
    told = [f"{n} {_ONE.get(name, name[:-1]) if n == 1 else name}" for name, n in counts.items()]
    console.note(f"{folder}: {', '.join(told)}")
    for what, command in made.missing:
        console.note(f"not there: {what} ({command})")
    for name, reason in made.unread.items():
        console.warn(f"{name}: not shown: {reason}")
    console.result_paths(
        [made.path], as_json=as_json, bytes=made.num_bytes, sections=made.counts,
        missing=[{"what": what, "command": command} for what, command in made.missing],
        unread=[{"name": name, "reason": reason} for name, reason in made.unread.items()],
    )  # fmt: skip
