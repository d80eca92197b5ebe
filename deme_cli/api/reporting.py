"""`report`: one HTML file of what lies in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli.errors import ConfigError
from deme_cli.files import require_output, write_whole

if TYPE_CHECKING:
    from deme_cli.reporting.page import Report

REPORT_NAME = "report.html"


@dataclass(frozen=True)
class WrittenReport:
    """The page as a file, what it shows, and the artifacts of the folder in a few words."""

    path: Path
    num_bytes: int
    page: Report
    artifacts: str


def report(
    folder: Path = Path("."),
    *,
    output: Path | None = None,
    title: str | None = None,
    force: bool = False,
) -> WrittenReport:
    """Make one HTML file of a run folder: tables, protocols, curves, search, figures.

    output: None for report.html in the folder.   title: None for the folder's name.   A file that
    cannot be read is told of on the page and in `page.unread`. Raises ConfigError, MissingError for
    a folder that is not there or has nothing of deme's.
    """
    from deme_cli.reporting.folder import open_folder

    target = output or folder / REPORT_NAME
    if target.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output {target}: expected a name that ends in .html")
    found = open_folder(folder)
    require_output(target, force=force)

    from deme_cli.reporting.page import gather, render
    from deme_cli.reporting.summary import counts_of

    page = gather(found, title=title)
    content = render(page)
    write_whole(target, [content])
    return WrittenReport(target, len(content), page, counts_of(found))
