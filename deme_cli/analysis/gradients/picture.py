"""The picture of gradients: how alike those of any two timesteps are, and how far to trust it.

On the left the cosines, red where two timesteps pull the same way, blue where they pull against
each other, with the suggested ranges. On the right the distributions of the cosines within these
ranges and across them, and over the timesteps the reliability of each bucket and the norm of its
gradient, with that of the mean gradient over each range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import (
    BLUE,
    DIVERGING,
    LINE,
    VERMILION,
    open_axis,
    render,
    shorten,
)
from deme_cli.analysis.gradients.agreement import mean_norm, noise_norm, pair_cosines
from deme_cli.timesteps import TimestepRange
from deme_cli.training.affinity import Affinity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def draw_gradients(affinity: Affinity) -> list[bytes]:
    """The picture in each of figure.FORMATS."""

    def draw(figure: Figure) -> None:
        left, right = figure.subfigures(1, 2, width_ratios=[1.3, 1], squeeze=False)[0]
        _draw_cosines(left, left.subplots(), affinity)
        upper, middle, lower = right.subplots(3, 1)
        _draw_distributions(upper, affinity)
        _draw_reliability(middle, affinity)
        _draw_norms(lower, affinity)

    return render(draw, size=(10.8, 6.6), title=_title(affinity))


def _title(affinity: Affinity) -> str:
    names = shorten(f"{affinity.model['source']} on {affinity.data['source']}", 40)
    buckets = f"{len(affinity.buckets)} buckets of {affinity.num:,} draws"
    return f"Gradients by timestep: {names}, {buckets}"


def _edges(affinity: Affinity) -> np.ndarray:
    return np.array([0, *(bucket.stop for bucket in affinity.buckets)])


def _draw_cosines(figure: SubFigure, axis: Axes, affinity: Affinity) -> None:
    edges, values = _edges(affinity), np.array(affinity.cosines)
    limit = _limit(values)
    mesh = axis.pcolormesh(
        edges, edges, values, cmap=DIVERGING, vmin=-limit, vmax=limit, rasterized=True
    )
    axis.set_aspect("equal")
    for span in affinity.ranges[1:]:
        axis.axhline(span.start, color="black", linewidth=0.8)
        axis.axvline(span.start, color="black", linewidth=0.8)
    bar = figure.colorbar(
        mesh, ax=axis, fraction=0.046, pad=0.02, extend="both" if limit < 1 else "neither"
    )
    bar.set_label("cosine (red: alike, blue: opposed)")
    bar.outline.set_visible(False)
    axis.set(xlabel="timestep t (0 = clean)", ylabel="timestep t (0 = clean)")
    count = len(affinity.ranges)
    axis.set_title(f"Cosine of mean gradients; lines: {count} suggested ranges", fontsize=9)


def _limit(cosines: np.ndarray) -> float:
    """The end of the colour scale: the largest cosine off the diagonal, to the next tenth."""
    others = np.abs(cosines[~np.eye(len(cosines), dtype=bool)]).max(initial=0.0)
    return float(np.clip(np.ceil(others * 10) / 10, 0.2, 1.0))


def _draw_distributions(axis: Axes, affinity: Affinity) -> None:
    """Densities of the cosines of two buckets in one range, and in two."""
    within, across = pair_cosines(affinity, affinity.ranges)
    bins = np.linspace(-1, 1, 41)
    for values, color, name in (
        (within, BLUE, "in one of these ranges"), (across, VERMILION, "in two of them"),
    ):  # fmt: skip
        if values.size:
            label = f"{name}: mean {values.mean():.2f}"
            density = np.histogram(values, bins, density=True)[0]
            axis.stairs(density, bins, color=color, fill=True, alpha=0.25)
            axis.stairs(density, bins, color=color, linewidth=1.4, label=label)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    axis.margins(y=0.35)
    axis.set(xlabel="cosine of two buckets", ylabel="density", xlim=(-1, 1))
    axis.set_title("Distribution of the cosines", fontsize=9)
    open_axis(axis)


def _draw_reliability(axis: Axes, affinity: Affinity) -> None:
    edges = _edges(affinity)
    axis.stairs(affinity.reliability, edges, color=BLUE, linewidth=1.4, baseline=None)
    axis.set_ylim(min(0.0, *affinity.reliability) - 0.03, 1.03)
    axis.set_ylabel("cosine of two halves")
    axis.set_xlim(0, affinity.buckets[-1].stop)
    axis.set_title("Reliability: agreement of two halves of a bucket's draws", fontsize=9)
    _mark_ranges(axis, affinity)


def _draw_norms(axis: Axes, affinity: Affinity) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.stairs(
        affinity.norms, _edges(affinity), color=VERMILION, linewidth=1.4, baseline=None,
        label="of a bucket",
    )  # fmt: skip
    for span in affinity.ranges:
        label = "of a range" if span == affinity.ranges[0] else None
        _level(axis, span, mean_norm(affinity, span), color=BLUE, label=label)
    whole = affinity.whole
    level, label = mean_norm(affinity, whole), "of all timesteps"
    if not level:  # which no logarithmic axis shows: the noise in it
        level, label = noise_norm(affinity, whole), f"{label} (below this)"
    _level(axis, whole, level, color=LINE, linestyle=(0, (4, 2)), label=label)
    if max(affinity.norms) > 10 * min(affinity.norms) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)
    axis.set(xlabel="timestep t (0 = clean)", ylabel="norm of the gradient")
    axis.set_title("Norm of the mean gradient", fontsize=9)
    axis.set_ylim(top=axis.get_ylim()[1] * (3 if axis.get_yscale() == "log" else 1.25))
    axis.legend(
        frameon=False, fontsize=7.5, loc="upper center", ncols=3, columnspacing=1, handlelength=1.4
    )
    axis.set_xlim(0, affinity.buckets[-1].stop)
    _mark_ranges(axis, affinity)


def _level(axis: Axes, span: TimestepRange, level: float, **style: Any) -> None:
    axis.hlines(level, span.start, span.stop, linewidth=1.4, **style)


def _mark_ranges(axis: Axes, affinity: Affinity) -> None:
    for span in affinity.ranges[1:]:
        axis.axvline(span.start, color=LINE, linewidth=0.8, linestyle=(0, (4, 3)))
    open_axis(axis)
