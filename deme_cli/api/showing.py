"""`show_search`: the trials of a search, finished or not, and a picture of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli.errors import MissingError
from deme_cli.outputs import write_whole

if TYPE_CHECKING:
    from deme_cli.merging.search.journal_file import JournalDocument
    from deme_cli.merging.search.trials import Trial as Trial


@dataclass(frozen=True)
class ShownSearch:
    """The measured trials of a journal; best: one of the last rung. Without a finite trial there is
    none, nor a picture."""

    journal: Path
    document: JournalDocument
    trials: Sequence[Trial]
    num_running: int
    best: Trial | None = None
    picture: Path | None = None

    @property
    def objectives(self) -> list[str]:
        """What each rung measures."""
        return [objective["name"] for objective in self.document.search["objectives"]]

    @property
    def is_finished(self) -> bool:
        return self.document.merged is not None

    def best_of_rung(self, rung: int) -> list[Trial]:
        """The trials of a rung by their objective, the best first; none if none is finite."""
        from deme_cli.errors import NumericsError
        from deme_cli.merging.search.trials import ranked

        try:
            return ranked([trial for trial in self.trials if trial.rung == rung])
        except NumericsError:
            return []


def show_search(path: Path) -> ShownSearch:
    """Read the trials of a search and draw them beside its journal.

    path: the journal, or the merged file that lies beside it. Raises MissingError, ArtifactError.
    """
    from deme_cli.merging.search.figure import best_of, draw_search
    from deme_cli.merging.search.journal import asked_trials
    from deme_cli.merging.search.journal_file import read_journal
    from deme_cli.merging.search.trials import trials_of

    journal = _journal_of(path)
    document = read_journal(journal)
    asked = asked_trials(document.trials, document.labels)
    trials = trials_of(asked)
    running = len(asked) - len(trials)
    if not any(math.isfinite(trial.objective) for trial in trials):
        return ShownSearch(journal, document, trials, running)
    picture = journal.with_suffix(".png")
    shown = ShownSearch(journal, document, trials, running, best_of(trials), picture)
    write_whole(picture, [draw_search(trials, document.labels, shown.objectives)])
    return shown


def _journal_of(path: Path) -> Path:
    if path.suffix != ".safetensors":
        return path
    journal = path.with_name(f"{path.stem}.trials.jsonl")
    if not journal.is_file():
        raise MissingError(f"{path}: no journal of its search beside it ({journal.name})")
    return journal
