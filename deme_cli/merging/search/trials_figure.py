"""The picture of any search: how the objective fell, and how it depends on each searched number.

Left, for each rung of the ladder the objective of every trial and the least so far; below, where
there are several rungs, how well one rung foretells the next. Right, the first rung's objective
against each searched number, later trials darker. A few far too large values are not to flatten
the picture: what lies above the shown values is marked at the top, as is what was not finite.
D searched numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from deme_cli.merging.search.figure import BEST, REFERENCES, is_wide, reference_values, to_png
from deme_cli.merging.search.heat_map import group_name, shorten
from deme_cli.merging.search.trials import Trial, ranked

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

MOST_NUMBERS = 8  # searched numbers with a panel of their own
LEFT_INCHES, COLUMN_INCHES, ROW_INCHES = 5.2, 1.9, 1.9
TRIAL, BROKEN = "#0072B2", "black"
NEAR = 4  # times the spread of the other values up to which the base or the mean is shown
WHISKER = 1.5  # quartile ranges above the third quartile from which a value is far off (Tukey)


def draw_trials(
    trials: Sequence[Trial], labels: Sequence[str], *, objectives: Sequence[str],
    importances: Mapping[str, float] | None = None, rhos: Sequence[float | None] = (),
) -> bytes:  # fmt: skip
    """A search as a PNG. labels: of the D numbers; objectives: what each rung minimised.

    importances: by label; they choose the numbers to show where there are many. rhos: Spearman's
    rank correlation of each rung with the next. Raises NumericsError where nothing was finite.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rungs = sorted({trial.rung for trial in trials})
    best = best_of(trials)
    shown = _numbers_to_show(trials, labels, importances)
    columns = math.ceil(len(shown) / (len(rungs) + 1))
    rows = math.ceil(len(shown) / columns)
    wide = max(COLUMN_INCHES * columns, 3.2)
    tall = ROW_INCHES * max(rows, len(rungs) + (len(rungs) > 1), 2) + 0.7
    with matplotlib.rc_context(
        {"font.size": 8.5, "axes.titlesize": 8.5, "legend.fontsize": 7.5, "axes.labelsize": 8.5}
    ):
        figure = Figure(figsize=(LEFT_INCHES + wide, tall), layout="constrained", dpi=160)
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[LEFT_INCHES, wide])[0]
        _draw_rungs(left, trials, objectives, rhos, best=best)
        axes = right.subplots(rows, columns, squeeze=False, sharey=True)
        lowest = [trial for trial in trials if trial.rung == rungs[0]]
        for axis in axes.ravel()[len(shown) :]:
            axis.set_axis_off()
        for index, axis in zip(shown, axes.ravel(), strict=False):
            _draw_slice(axis, lowest, index, best=best)
            axis.set_xlabel(number_name(labels[index]))
            if importances and labels[index] in importances:
                axis.set_title(f"importance {importances[labels[index]]:.2g}")
        right.supylabel(_objective(objectives, rungs[0]), fontsize=8.5)
        right.supxlabel(_caption(shown, labels, importances), fontsize=8.5)
        return to_png(figure)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The best trial of the highest rung where any is finite."""
    finite = [trial.rung for trial in trials if math.isfinite(trial.objective)]
    top = max(finite, default=0)
    return ranked([trial for trial in trials if trial.rung == top])[0]


def number_name(label: str) -> str:
    """`w of 1of4`, or `w of 1of4` with its group, shortened, on a line of its own."""
    expert, _, group = label.partition(" ")
    return f"w of {expert}\n{shorten(group_name(group), 26)}" if group else f"w of {expert}"


def window(values: Sequence[float], references: Sequence[float]) -> tuple[float, float]:
    """The least and largest value to show: all but those far off; references where they are near.

    Values above the third quartile by WHISKER quartile ranges, of logarithms where all are
    positive, are far off; a reference is near where it makes them at most NEAR times wider.
    """
    finite = np.sort([value for value in values if math.isfinite(value)])
    if not finite.size:
        return 0.0, 1.0
    scale = np.log(finite) if finite[0] > 0 else finite
    first, third = np.quantile(scale, [0.25, 0.75])
    low, high = finite[0], finite[scale <= third + WHISKER * (third - first)].max()
    for value in sorted(value for value in references if math.isfinite(value)):
        if value - low <= NEAR * (high - low) or len(finite) <= 3:
            low, high = min(low, value), max(high, value)
    return float(low), float(high)


def _set_window(axis: Axes, low: float, high: float, *, side: Literal["x", "y"] = "y") -> None:
    """Limits with room for marks at the upper end; logarithmic where values spread widely."""
    set_limits = axis.set_ylim if side == "y" else axis.set_xlim
    set_scale = axis.set_yscale if side == "y" else axis.set_xscale
    if is_wide(np.array([low, high])):
        set_scale("log")
        set_limits(low * (low / high) ** 0.08, high * (high / low) ** 0.16)
        return
    spread = (high - low) or abs(high) * 0.05 or 1.0
    set_limits(low - 0.08 * spread, high + 0.16 * spread)
    axis.ticklabel_format(axis=side, useOffset=False)
    axis.locator_params(axis=side, nbins=2 if side == "x" else 6)  # long numbers need room


def _draw_rungs(
    side: SubFigure, trials: Sequence[Trial], objectives: Sequence[str],
    rhos: Sequence[float | None], *, best: Trial,
) -> None:  # fmt: skip
    """One panel per rung, one above the other, and a row of panels for neighbouring rungs."""
    rungs = sorted({trial.rung for trial in trials})
    grid = side.add_gridspec(len(rungs) + (len(rungs) > 1), max(len(rungs) - 1, 1))
    legend: dict[str, Artist] = {}
    for row, rung in enumerate(rungs):
        axis = side.add_subplot(grid[row, :])
        own = [trial for trial in trials if trial.rung == rung]
        _draw_progress(axis, own)
        axis.set_ylabel(_objective(objectives, rung))
        axis.set_title(_rung_title(own), loc="left")
        handles, names = axis.get_legend_handles_labels()
        legend |= dict(zip(names, handles, strict=True))
    axis.set_xlabel("trial")
    for column, (low, high) in enumerate(itertools.pairwise(rungs)):
        axis = side.add_subplot(grid[-1, column])
        rho = rhos[column] if column < len(rhos) else None
        _draw_pairs(axis, trials, (low, high), rho=rho, best=best)
        axis.set_xlabel(_objective(objectives, low))
        axis.set_ylabel(_objective(objectives, high))
    side.legend(
        list(legend.values()), list(legend), loc="outside upper left", ncols=len(legend),
        frameon=False, columnspacing=1.0, handlelength=1.5, handletextpad=0.4,
    )  # fmt: skip


def _draw_progress(axis: Axes, trials: Sequence[Trial]) -> None:
    """The objective of one rung's trials by number, the least so far, base and mean."""
    values = reference_values(trials)
    low, high = window([trial.objective for trial in trials], list(values.values()))
    shown = [trial for trial in trials if trial.objective <= high]
    axis.plot(
        [trial.index + 1 for trial in shown], [trial.objective for trial in shown], "o",
        color=TRIAL, markersize=3.5, alpha=0.7, markeredgewidth=0,
    )  # fmt: skip
    numbers = [trial.index + 1 for trial in trials]
    axis.step(
        [*numbers, numbers[-1] + 0.5], [*(t.best for t in trials), trials[-1].best],
        where="post", color="black", linewidth=1.3, label="best so far",
    )  # fmt: skip
    _draw_references(axis, values, high)
    best = min(trials, key=lambda trial: trial.objective)
    if math.isfinite(best.objective):
        _draw_star(axis, best.index + 1, best.objective, label="best")
    _mark_above(axis, trials, numbers, high)
    _set_window(axis, low, high)
    axis.set_xlim(numbers[0] - 0.7 - 0.02 * len(numbers), numbers[-1] + 0.7 + 0.02 * len(numbers))
    axis.locator_params(axis="x", integer=True, min_n_ticks=1)
    axis.grid(alpha=0.25, linewidth=0.6)


def _draw_slice(axis: Axes, trials: Sequence[Trial], index: int, *, best: Trial) -> None:
    """The objective against one searched number; later trials darker, the best marked."""
    values = reference_values(trials)
    low, high = window([trial.objective for trial in trials], list(values.values()))
    shown = [trial for trial in trials if trial.objective <= high]
    axis.scatter(
        [trial.point[index] for trial in shown], [trial.objective for trial in shown], s=11,
        c=[trial.index for trial in shown], cmap="Blues", linewidths=0,
        vmin=-0.5 * max(trial.index for trial in trials) - 1,
    )  # fmt: skip
    _draw_references(axis, values, high)
    axis.axvline(best.point[index], color=BEST, linewidth=0.8, zorder=0)
    for trial in trials:
        if trial.point == best.point and trial.objective <= high:
            _draw_star(axis, trial.point[index], trial.objective)
            break
    _mark_above(axis, trials, [trial.point[index] for trial in trials], high)
    _set_window(axis, low, high)
    axis.grid(alpha=0.25, linewidth=0.6)


def _draw_pairs(
    axis: Axes, trials: Sequence[Trial], rungs: tuple[int, int], *, rho: float | None, best: Trial
) -> None:
    """Two rungs' objectives of the candidates that both tried."""
    low, high = (
        {t.point: t for t in trials if t.rung == rung and math.isfinite(t.objective)}
        for rung in rungs
    )
    shared = [point for point in low if point in high]
    if not shared:
        axis.text(0.5, 0.5, "no candidate in both", ha="center", transform=axis.transAxes)
        axis.set(xticks=[], yticks=[])
        return
    pairs = np.array([(low[point].objective, high[point].objective) for point in shared])
    axis.plot(*pairs.T, "o", color=TRIAL, markersize=4, alpha=0.7, markeredgewidth=0)
    for point, pair in zip(shared, pairs, strict=True):
        for name, color, _ in REFERENCES:
            if high[point].name == name:
                axis.plot(*pair, "D", color=color, markersize=5)
        if point == best.point:
            _draw_star(axis, *pair)
    (x_low, x_high), (y_low, y_high) = (window(values, ()) for values in pairs.T)
    axis.tick_params(labelsize="small")
    _set_window(axis, x_low, x_high, side="x")
    _set_window(axis, y_low, y_high)
    beyond = int(((pairs[:, 0] > x_high) | (pairs[:, 1] > y_high)).sum())
    title = f"n = {len(shared)}" + (f", {beyond} beyond" if beyond else "")
    known = rho is not None and math.isfinite(rho)
    axis.set_title(f"Spearman's $\\rho$ = {rho:.2f}\n{title}" if known else title)
    axis.grid(alpha=0.25, linewidth=0.6)


def _draw_references(axis: Axes, values: Mapping[str, float], high: float) -> None:
    for name, color, dashes in REFERENCES:
        if values.get(name, math.inf) <= high:
            axis.axhline(values[name], color=color, linestyle=dashes, linewidth=1.1, label=name)


def _mark_above(axis: Axes, trials: Sequence[Trial], xs: Sequence[float], high: float) -> None:
    """Marks at the top of the panel for trials above it, and for those that were not finite."""
    finite = [math.isfinite(trial.objective) for trial in trials]
    above = [x for x, t, ok in zip(xs, trials, finite, strict=True) if ok and t.objective > high]
    broken = [x for x, ok in zip(xs, finite, strict=True) if not ok]
    marks = ((above, "^", TRIAL, "above the panel"), (broken, "x", BROKEN, "not finite"))
    for places, marker, color, label in marks:
        if places:
            axis.plot(
                places, [0.95] * len(places), marker, color=color, markersize=4, alpha=0.6,
                transform=axis.get_xaxis_transform(), label=label,
            )  # fmt: skip


def _draw_star(axis: Axes, x: float, y: float, label: str | None = None) -> None:
    """The mark of the best."""
    axis.plot(
        x, y, "*", color=BEST, markersize=11, markeredgecolor="white", markeredgewidth=0.6,
        zorder=5, label=label,
    )  # fmt: skip


def _objective(objectives: Sequence[str], rung: int) -> str:
    """The name of a rung's objective, with the rung's number where there are several."""
    return f"{objectives[rung]} (rung {rung})" if len(objectives) > 1 else objectives[rung]


def _rung_title(trials: Sequence[Trial]) -> str:
    best = min(trials, key=lambda trial: trial.objective)
    references = [f"{name} {_number(value)}" for name, value in reference_values(trials).items()]
    return ", ".join([f"best {_number(best.objective)} at trial {best.index + 1}", *references])


def _number(value: float) -> str:
    """Five digits, also where the last are 0."""
    return f"{value:#.5g}".rstrip(".")


def _numbers_to_show(
    trials: Sequence[Trial], labels: Sequence[str], importances: Mapping[str, float] | None
) -> list[int]:
    """Which of the D numbers get a panel: the most important ones, else those that varied most."""
    if len(labels) <= MOST_NUMBERS:
        return list(range(len(labels)))
    if importances:
        rank = [importances.get(label, 0.0) for label in labels]
    else:
        finite = [trial.point for trial in trials if math.isfinite(trial.objective)]
        rank = np.std(finite, axis=0).round(12).tolist()
    return sorted(range(len(labels)), key=lambda i: -rank[i])[:MOST_NUMBERS]


def _caption(
    shown: Sequence[int], labels: Sequence[str], importances: Mapping[str, float] | None
) -> str:
    if len(shown) == len(labels):
        return "later trials are darker"
    which = "most important" if importances else "most varied"
    return f"the {len(shown)} {which} of {len(labels)} coefficients; later trials are darker"
