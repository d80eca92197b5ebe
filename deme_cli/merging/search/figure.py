"""The picture of a grid: how the objective depends on each coefficient, and on each pair.

On the diagonal the least objective for each value of one coefficient, below it a map for each pair;
in both, the coefficients not shown are the best ones of the grid. One expert makes one curve.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from deme_cli.merging.search.grid import Grid
from deme_cli.merging.search.trials import BASE_NAME, MEAN_NAME, Trial, ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

CELL_INCHES, MOST_INCHES = 2.4, 15.0
WIDE_SPREAD = 8.0  # largest over least objective from which axes and colours are logarithmic
MOST_NUMBERED = 25  # cells of a map up to which each shows its number
BEST, BASE, MEAN = "#D55E00", "0.4", "#009E73"  # of Okabe and Ito: told apart by every eye
REFERENCES = ((BASE_NAME, BASE, "--"), (MEAN_NAME, MEAN, "-."))  # name, colour and dashes


def draw_search(
    trials: Sequence[Trial], grid: Grid, labels: Sequence[str], *, objective: str
) -> bytes:
    """The search as a PNG. labels: the experts' names; objective: what was minimised.

    trials: the grid's points, of one rung; the base and the mean, known by name, are lines.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    count, best = len(grid), ranked(trials)[0]
    size = min(CELL_INCHES * max(count, 2), MOST_INCHES)
    figure = Figure(figsize=(size + 1.2 * (count > 1), size + 0.6), layout="constrained", dpi=130)
    axes = figure.subplots(count, count, squeeze=False)
    maps = {
        (row, column): least_over_others(trials, grid, row, column)
        for row in range(count)
        for column in range(row)
    }
    norm = _norm(np.concatenate([values.ravel() for values in maps.values()] or [np.zeros(0)]))
    for row in range(count):
        for column in range(count):
            axis = axes[row][column]
            if column > row:
                axis.set_axis_off()
            elif column == row:
                _draw_curve(axis, trials, grid, row, best=best)
            else:
                _draw_map(axis, maps[row, column], grid[row], grid[column], norm=norm)
                _mark_best(axis, best, grid, row, column)
            if row == count - 1:
                axis.set_xlabel(f"w of expert {labels[column]}")
            if column == 0:
                axis.set_ylabel(objective if row == 0 else f"w of expert {labels[row]}")
    handles, names = axes[0][0].get_legend_handles_labels()
    axes[0][-1].legend(handles, names, loc="best" if count == 1 else "upper right")
    if maps:
        bar = figure.colorbar(ScalarMappable(norm, "viridis_r"), ax=axes, shrink=0.6, pad=0.02)
        bar.set_label(f"{objective}, least over the other coefficients")
    figure.suptitle(_title(trials, best, objective))
    return to_png(figure)


def to_png(figure: Figure) -> bytes:
    """The figure as it is saved."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def least_over_others(trials: Sequence[Trial], grid: Grid, row: int, column: int) -> np.ndarray:
    """The least objective for each pair of values of two experts, (values of row, of column).

    The mean is left out where it is not a point of the grid; NaN where nothing was finite.
    """
    least = np.full((len(grid[row]), len(grid[column])), math.inf)
    for trial in trials:
        w = trial.point
        if all(value in values for value, values in zip(w, grid, strict=True)):
            cell = grid[row].index(w[row]), grid[column].index(w[column])
            least[cell] = min(least[cell], trial.objective)
    least[~np.isfinite(least)] = math.nan
    return least


def _draw_curve(
    axis: Axes, trials: Sequence[Trial], grid: Grid, index: int, *, best: Trial
) -> None:
    """The least objective for each value of one coefficient; base and mean are lines."""
    least = np.diag(least_over_others(trials, grid, index, index))
    axis.plot(grid[index], least, color="black", marker="o", markersize=4)
    shown = [*least]
    values = reference_values(trials)
    for name, color, dashes in REFERENCES:
        if math.isfinite(values.get(name, math.inf)):
            axis.axhline(values[name], color=color, linestyle=dashes, linewidth=1.2, label=name)
            shown.append(values[name])
    axis.plot(
        best.point[index], best.objective, color=BEST, marker="s", markersize=9,
        markerfacecolor="none", markeredgewidth=2, linestyle="none", label="best",
    )  # fmt: skip
    if is_wide(np.array(shown)):
        axis.set_yscale("log")
    else:
        axis.ticklabel_format(axis="y", useOffset=False)
    axis.set_xticks(grid[index], [f"{value:g}" for value in grid[index]])
    axis.tick_params(labelsize="small")
    axis.grid(alpha=0.3)


def _draw_map(
    axis: Axes, values: np.ndarray, rows: Sequence[float], columns: Sequence[float], *,
    norm: Normalize,
) -> None:  # fmt: skip
    """A map of cells, numbered where there are few; grey where nothing was finite."""
    axis.set_facecolor("lightgray")
    axis.imshow(values, origin="lower", cmap="viridis_r", norm=norm, aspect="auto")
    axis.set_xticks(range(len(columns)), [f"{value:g}" for value in columns], fontsize="small")
    axis.set_yticks(range(len(rows)), [f"{value:g}" for value in rows], fontsize="small")
    if values.size > MOST_NUMBERED:
        return
    digits = _digits(norm)
    size = min(7.0, 75 * CELL_INCHES / len(columns) / (digits + 2))  # points; what fits in a cell
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            dark = norm(value) > 0.5  # viridis_r darkens towards large values
            axis.text(
                column, row, f"{value:.{digits}g}", ha="center", va="center", fontsize=size,
                color="white" if dark else "black",
            )  # fmt: skip


def _norm(values: np.ndarray) -> Normalize:
    """Colours from the least to the largest finite value, logarithmic where they spread widely."""
    from matplotlib.colors import LogNorm, Normalize

    finite = values[np.isfinite(values)]
    if not finite.size:
        return Normalize(0, 1)
    return (LogNorm if is_wide(finite) else Normalize)(finite.min(), finite.max())


def is_wide(values: np.ndarray) -> bool:
    """Whether positive values spread over much more than their least."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > WIDE_SPREAD * finite.min())


def _digits(norm: Normalize) -> int:
    """Significant digits that tell neighbouring colours apart: 3 to 6."""
    low, high = norm.vmin, norm.vmax
    spread = (high - low) / abs(high) if low is not None and high else 0
    return int(np.clip(2 - math.floor(math.log10(spread)), 3, 6)) if spread > 0 else 3


def _mark_best(axis: Axes, best: Trial, grid: Grid, row: int, column: int) -> None:
    """A frame around the best cell, or a star where the best is the mean, between the cells."""
    from matplotlib.patches import Rectangle

    x, y = (_place(best.point[i], grid[i]) for i in (column, row))
    if x.is_integer() and y.is_integer():
        frame = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=BEST, linewidth=3)
        frame.set_clip_on(False)
        axis.add_patch(frame)
    else:
        axis.plot(x, y, marker="*", markersize=14, color=BEST, markeredgecolor="white")


def _place(value: float, values: Sequence[float]) -> float:
    """Where a coefficient lies on an axis that numbers the grid's values."""
    return float(np.interp(value, values, range(len(values))))


def reference_values(trials: Sequence[Trial]) -> dict[str, float]:
    """The objectives of the base and the mean by name, where they were tried."""
    names = [name for name, _, _ in REFERENCES]
    return {trial.name: trial.objective for trial in trials if trial.name in names}


def _title(trials: Sequence[Trial], best: Trial, objective: str) -> str:
    w = ", ".join(f"{value:.3g}" for value in best.point)
    values = reference_values(trials).items()
    references = ", ".join(f"{name} {value:.5g}" for name, value in values)
    return (
        f"{len(trials)} candidates: best {best.objective:.5g} at w = {w}\n"
        f"{references or 'no reference'}  ({objective})"
    )
