"""`show_search`: the trials of a search as they lie in its journal, and their picture.

Left the objective of every trial of the last stage and the least so far; right the objective of the
first stage against each searched number, later trials darker. A few values far too large are not to
flatten the picture: they are left out, and the axis ends above the others.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.errors import MissingError
from deme_cli.files import write_whole
from deme_cli.merging.journal import Trial, ranked, read_journal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 8  # searched numbers with a panel of their own: those that varied most
BEST = "#D55E00"  # of Okabe and Ito: told apart by every eye
REFERENCES = (("base", "0.4", "--"), ("1/N each", "#009E73", "-."))  # name, colour, dashes
WHISKER = 1.5  # quartile ranges above the third quartile from which a value is far off (Tukey)


@dataclass(frozen=True)
class ShownSearch:
    """The trials of a journal, `labels` of their numbers; best: a trial of the last stage. Without
    a finite trial there is none, nor a picture."""

    journal: Path
    search: Mapping[str, Any]
    labels: Sequence[str]
    trials: Sequence[Trial]
    is_finished: bool
    best: Trial | None = None
    picture: Path | None = None

    @property
    def objectives(self) -> list[str]:
        """What each stage measures."""
        return [objective["name"] for objective in self.search["objectives"]]


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
    shown = ShownSearch(journal, search, labels, trials, merged is not None)
    done = [trial for trial in trials if trial.is_done]
    if not any(math.isfinite(trial.value) for trial in done):
        return shown
    picture = journal.with_name(f"{journal.name.removesuffix('.trials.jsonl')}.search.png")
    write_whole(picture, [draw_search(done, labels, shown.objectives)])
    return ShownSearch(journal, search, labels, trials, shown.is_finished, best_of(done), picture)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The best trial of the highest stage where any is finite."""
    top = max((trial.stage for trial in trials if math.isfinite(trial.value)), default=0)
    return ranked([trial for trial in trials if trial.stage == top])[0]


def draw_search(trials: Sequence[Trial], labels: Sequence[str], objectives: Sequence[str]) -> bytes:
    """A search as a PNG. labels: of the D numbers; objectives: what each stage minimised.

    Raises NumericsError where nothing was finite.
    """
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    best = best_of(trials)
    first, last = ([t for t in trials if t.stage == stage] for stage in (0, best.stage))
    spread = np.std([t.point for t in first], axis=0)
    shown = sorted(np.argsort(-spread, kind="stable")[:MOST_PANELS].tolist())
    columns = math.ceil(len(shown) / 2)
    with matplotlib.rc_context({"font.size": 8.5}):
        figure = Figure(figsize=(5.2 + 2.2 * columns, 4.6), layout="constrained", dpi=160)
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[5.2, 2.2 * columns])[0]
        axis, numbers = left.subplots(), [t.index + 1 for t in last]
        _draw(axis, last, numbers, best)
        axis.step(
            numbers, np.minimum.accumulate([t.value for t in last]), where="post", color="black",
            linewidth=1.2, label="best so far",
        )  # fmt: skip
        axis.set(xlabel="trial", ylabel=objectives[best.stage])
        axis.legend(loc="upper right", fontsize="small")
        axes = right.subplots(min(len(shown), 2), columns, squeeze=False, sharey=True).ravel()
        for number, panel in zip(shown, axes, strict=False):
            _draw(panel, first, [t.point[number] for t in first], best)
            panel.axvline(best.point[number], color=BEST, linewidth=0.8, zorder=0)
            panel.set_xlabel(f"w of {labels[number]}"[:40], fontsize="small")
        for panel in axes[len(shown) :]:
            panel.set_axis_off()
        more = f"; {len(shown)} of {len(labels)} coefficients" if len(shown) < len(labels) else ""
        right.suptitle(f"{objectives[0]}, later trials darker{more}", fontsize="medium")
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def _draw(axis: Axes, trials: Sequence[Trial], xs: Sequence[float], best: Trial) -> None:
    """The objectives of trials at `xs`, with the base, the mean and the best."""
    high, low = highest_shown([t.value for t in trials]), min(t.value for t in trials)
    kept = [(x, t) for x, t in zip(xs, trials, strict=True) if t.value <= high]
    axis.scatter(
        [x for x, _ in kept], [t.value for _, t in kept], s=12, c=[t.index for _, t in kept],
        cmap="Blues", vmin=-0.5 * max(t.index for t in trials) - 1, linewidths=0,
    )  # fmt: skip
    for x, trial in kept:
        for name, color, dashes in REFERENCES:
            if trial.name == name:
                axis.axhline(trial.value, color=color, linestyle=dashes, label=name)
        if trial.point == best.point:
            axis.plot(x, trial.value, "*", color=BEST, markersize=11, label="best", zorder=5)
    room = 0.08 * ((high - low) or abs(high) or 1.0)
    axis.set_ylim(low - room, high + room)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.locator_params(axis="x", nbins=4)
    axis.ticklabel_format(axis="y", useOffset=False)


def highest_shown(values: Sequence[float]) -> float:
    """The largest finite value that is not far above the others."""
    import numpy as np

    finite = np.array([value for value in values if math.isfinite(value)])
    first, third = np.quantile(finite, [0.25, 0.75])
    return float(finite[finite <= third + WHISKER * (third - first)].max())
