"""One HTML file of a run folder, with nothing outside it: no script, no network, no date.

Everything that comes from a file is escaped by the template; nothing is marked safe. The same
folder makes the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_cli.errors import ArtifactError
from deme_cli.reporting import figures, summary
from deme_cli.reporting.comparisons import comparison, is_comparison
from deme_cli.reporting.curves import Curves, training_curves
from deme_cli.reporting.evaluations import evaluation
from deme_cli.reporting.folder import Folder, Unread
from deme_cli.reporting.pictures import Picture
from deme_cli.reporting.searches import Merge, merges
from deme_cli.reporting.tables import Results, Table

_TEMPLATE = Path(__file__).with_name("page.html")
# Control characters, lone surrogates and noncharacters, which HTML has no place for.
_LAST_OF_PLANES = "".join(
    chr(p + end) for p in range(0, 0x110000, 0x10000) for end in (0xFFFE, 0xFFFF)
)
_UNPRINTABLE = re.compile(
    f"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_LAST_OF_PLANES}]"
)
_MOST_VERDICTS = 3  # in the head


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    title: str
    name: str
    facts: list[tuple[str, str]]
    missing: list[summary.Missing]
    results: list[Results]
    curves: Curves | None
    merges: list[Merge]
    pictures: Mapping[str, Picture]  # of searches, by file name
    analyses: list[figures.Figure]
    samples: list[figures.Figure]
    shares_noise: bool
    others: list[figures.Figure]
    artifacts: Table
    below: Mapping[str, int]
    unread: list[Unread]

    @property
    def verdicts(self) -> list[str]:
        """What the first table comes to."""
        return self.results[0].verdicts[:_MOST_VERDICTS] if self.results else []

    @property
    def counts(self) -> dict[str, int]:
        """How much each section holds."""
        return {
            "tables": len(self.results),
            "cards": sum(len(result.cards) for result in self.results),
            "curves": self.curves.num_runs if self.curves else 0,
            "searches": len(self.merges),
            "figures": len(self.analyses),
            "samples": len(self.samples),
            "pictures": len(self.others),
            "artifacts": len(self.artifacts.rows),
        }


def gather(folder: Folder, *, title: str | None = None) -> Report:
    """Read what the sections need; what cannot be read is noted in `unread`."""
    compared = _results(folder, is_comparison, comparison)
    evaluated = _results(folder, _is_evaluation, evaluation)
    analyses = figures.analyses(folder)
    found = merges(folder)
    opened = {
        name: picture
        for merge in found
        for name in merge.pictures
        if (picture := figures.open_picture(folder, folder.pictures[name]))
    }
    lacking = summary.missing(
        folder, has_table=bool(compared or evaluated), has_figures=bool(analyses),
        is_comparison=bool(compared),
    )  # fmt: skip
    return Report(
        title or folder.name, folder.name, list(summary.facts(folder)), lacking,
        [*evaluated, *compared], training_curves(folder), found, opened, analyses,
        figures.samples(folder), figures.share_noise(folder),
        list(figures.other_pictures(folder)),
        summary.artifact_table(folder), folder.below,
        sorted(folder.unread, key=lambda one: one.name),
    )  # fmt: skip


def _is_evaluation(document: Mapping[str, Any]) -> bool:
    rows = document.get("rows")
    is_one = isinstance(rows, list) and "schema_version" in document and "kind" not in document
    return is_one and not is_comparison(document)


def _results(
    folder: Folder,
    is_one: Callable[[Mapping[str, Any]], bool],
    read: Callable[[str, Mapping[str, Any]], Results],
) -> list[Results]:
    """The tables of one sort; a document of another shape is noted and left out."""
    found = []
    for name, document in folder.documents.items():
        if not is_one(document):
            continue
        try:
            found.append(read(name, document))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            folder.give_up(name, ArtifactError(f"not a whole table ({error!r})"))
    return found


def render(report: Report) -> bytes:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_printable, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report).encode()


def _printable(value: Any) -> Any:
    """A text without the characters that no page may hold."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value
