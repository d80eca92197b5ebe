"""`deme report`: one HTML file of what lies in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.commands.options import Given, argument, command, flag


@command("force")
def report(
    common: Given,
    folder: Annotated[Path, argument("FOLDER", "The folder that deme worked in.")] = Path("."),
    output: Annotated[
        Path | None, flag("--output -o", "HTML file to write [default: report.html in FOLDER].")
    ] = None,
    title: Annotated[
        str | None, flag("--title", "Title of the page [default: the folder's name].")
    ] = None,
    as_json: bool = False,
) -> None:
    """Make one HTML file of a run folder: tables, protocols, curves, search, figures, samples.

    It holds everything inside, opens without a network, and runs no script.

    Example: deme report --title "Digits, four experts"
    """
    made = deme_cli.report(folder, output=output, title=title, **common)
    counts = {name: count for name, count in made.counts.items() if count}
    ones = {"searches": "search"}
    told = [f"{n} {ones.get(name, name[:-1]) if n == 1 else name}" for name, n in counts.items()]
    console.note(f"{folder}: {', '.join(told)}")
    for what, line in made.missing:
        console.note(f"not there: {what} ({line})")
    for name, reason in made.unread.items():
        console.warn(f"{name}: not shown: {reason}")
    console.result_paths(
        [made.path], as_json=as_json, bytes=made.num_bytes, sections=made.counts,
        missing=[{"what": what, "command": line} for what, line in made.missing],
        unread=[{"name": name, "reason": reason} for name, reason in made.unread.items()],
    )  # fmt: skip
