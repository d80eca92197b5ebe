"""`show_search`: the trials of a search as they lie in its journal, and their picture.

Left the objective of every trial of the last stage and the least so far; right the coefficients
that the first stage has tried, darker where the objective is lower. A few values far too large are
not to flatten the picture: its axis ends above the others.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.console import plain
from deme_cli.errors import MissingError
from deme_cli.files import write_whole
from deme_cli.merging.journal import Trial, ranked, read_journal

if TYPE_CHECKING:
    import numpy as np

MOST_NAMED = 40  # searched numbers that have room for their names
BEST = "#D55E00"  # of Okabe and Ito: told apart by every eye
REFERENCES = (("base", "0.4", "--"), ("1/N each", "#009E73", "-."))  # name, colour, dashes
WHISKER = 1.5  # quartile ranges above the third quartile from which a value is far off (Tukey)


@dataclass(frozen=True)
class ShownSearch:
    """The trials of a journal, `labels` of their numbers; objectives: what each stage measures;
    best: a trial of the last stage. Without a finite trial there is none, nor a picture."""

    journal: Path
    search: Mapping[str, Any]
    labels: Sequence[str]
    trials: Sequence[Trial]
    objectives: Sequence[str]
    is_finished: bool
    best: Trial | None = None
    picture: Path | None = None


def journal_path(output: Path) -> Path:
    """The trials of the search for `output`."""
    return output.with_name(f"{output.stem}.trials.jsonl")


def show_search(path: Path) -> ShownSearch:
    """Read the trials of a search, finished or not, and draw them beside its journal.

    path: the journal, or the merged file that lies beside it. Raises MissingError, ArtifactError.
    """
    journal = journal_path(path) if path.suffix == ".safetensors" else path
    if not journal.is_file() and journal != path:
        raise MissingError(f"{path}: no journal of its search beside it ({journal.name})")
    search, labels, trials, merged = read_journal(journal)
    names = [objective["name"] for objective in search["objectives"]]
    shown = ShownSearch(journal, search, labels, trials, names, merged is not None)
    done = [trial for trial in trials if trial.is_done]
    top = max((trial.stage for trial in done if math.isfinite(trial.value)), default=None)
    if top is None:
        return shown
    best = ranked([trial for trial in done if trial.stage == top])[0]
    picture = journal.with_name(f"{journal.name.removesuffix('.trials.jsonl')}.search.png")
    write_whole(picture, _draw(done, best, labels, names))
    return replace(shown, best=best, picture=picture)


def _draw(
    trials: Sequence[Trial], best: Trial, labels: Sequence[str], objectives: Sequence[str]
) -> bytes:
    """A search as a PNG."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    first, last = ([t for t in trials if t.stage == stage] for stage in (0, best.stage))
    with matplotlib.rc_context({"font.size": 8.5}):
        figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=160)
        left, right = figure.subplots(1, 2)
        numbers, values = [t.index + 1 for t in last], np.array([t.value for t in last])
        left.scatter(numbers, values, s=12, label="trials")
        left.step(numbers, np.minimum.accumulate(values), "k", where="post", label="best so far")
        for name, color, dashes in REFERENCES:
            for trial in last:
                if trial.name == name:
                    label = f"{name}: {plain(trial.value)}"  # which may be outside what is shown
                    left.axhline(trial.value, color=color, linestyle=dashes, label=label)
        left.set(xlabel="trial", ylabel=objectives[best.stage])
        left.set_ylim(*_span(values))
        left.legend(loc="upper right", fontsize="small")
        # worse ones first, so that the better ones lie on them
        order = sorted(first, key=lambda t: -t.value)
        low, high = _span(np.array([t.value for t in order]))
        places = np.tile(np.arange(len(labels)), (len(order), 1))
        shades = np.repeat([min(t.value, high) for t in order], len(labels))
        drawn = right.scatter(
            places.ravel(), np.array([t.point for t in order]).ravel(), s=10, c=shades,
            cmap="viridis", vmin=low, vmax=high,
        )  # fmt: skip
        right.plot(places[0], best.point, "*", color=BEST, markersize=8, label="best")
        right.set(ylabel="coefficient", xlabel="coefficients")
        if len(labels) <= MOST_NAMED:
            right.set_xticks(places[0], labels, rotation=30, ha="right")
            right.set_xlabel("")
        right.legend(loc="upper right", fontsize="small")
        figure.colorbar(drawn, label=objectives[0])
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def _span(values: np.ndarray) -> tuple[float, float]:
    """From below the least to the largest that is not far above the others."""
    import numpy as np

    finite = values[np.isfinite(values)]
    first, third = np.quantile(finite, [0.25, 0.75])
    low, high = finite.min(), finite[finite <= third + WHISKER * (third - first)].max()
    room = 0.08 * ((high - low) or abs(high) or 1.0)
    return float(low - room), float(high + room)
