"""The picture of losses: where on [0, T) each model gained on the first, and where it lost.

On top the change in per cent against the timestep, with 95 % intervals for the models of all
timesteps; an expert is drawn strong in its own range and thin outside it, where the axis does not
follow it. Below, the losses themselves, and the changes by range as a table of colours, in which
numbers that the interval does not tell from 0 are grey.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import (
    BASE,
    DIVERGING,
    ENSEMBLE,
    LINE,
    MERGED,
    OTHER,
    color_of,
    open_axis,
    render,
    shorten,
)
from deme_cli.analysis.losses.measure import Curve, Losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAME = 18  # characters of a model's name
_NEAR = 5.0  # per cent up to which the axis of changes is linear, beyond it logarithmic
_FAR = 1.5  # of what is followed, where that axis ends
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


def draw_losses(losses: Losses, *, title: str, foot: str) -> list[bytes]:
    """The picture in each of figure.FORMATS."""
    rows = len(losses.curves)

    def draw(figure: Figure) -> None:
        heights = [3.2, 2.2 + 0.16 * rows]
        upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        top = upper.subplots()
        _draw_changes(top, losses)
        left, right = lower.subplots(1, 2, width_ratios=[1, 1.25])
        _draw_losses(left, losses)
        _draw_table(right, losses)
        handles, labels = (left if len(losses.curves) == 1 else top).get_legend_handles_labels()
        top.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False,
            fontsize=8,
        )  # fmt: skip

    return render(draw, size=(10.4, 5.9 + 0.16 * rows), title=title, foot=foot)


def _edges(losses: Losses) -> np.ndarray:
    return np.array([0, *(bucket.stop for bucket in losses.buckets)])


def style_of(losses: Losses, curve: Curve) -> dict[str, Any]:
    """Colour, width and dashes of a curve."""
    experts = [one.name for one in losses.curves if one.span is not None]
    if curve is losses.curves[0]:
        return {"color": BASE, "linewidth": 2.2}
    if curve.span is not None:
        place = experts.index(curve.name)
        dashes = "-" if place < 6 else (0, (4, 1.5))
        return {"color": color_of(place), "linewidth": 3.2, "linestyle": dashes}
    if curve.kind in ("ensemble", "merged"):  # the ensemble runs on its experts' lines
        color, width = (ENSEMBLE, 1.0) if curve.kind == "ensemble" else (MERGED, 1.6)
        return {"color": color, "linewidth": width, "zorder": 3}
    return {"color": OTHER, "linewidth": 1.6, "linestyle": (0, (5, 1, 1, 1))}


def _changes(losses: Losses, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Differences and half-widths in per cent of the first model's loss in the bucket."""
    scale = 100 / losses.curves[0].losses
    return curve.differences * scale, curve.difference_halves * scale


def _inside(losses: Losses, curve: Curve) -> np.ndarray:
    """Buckets that a curve is meant for: those that touch an expert's range, else all."""
    if curve.span is None:
        return np.full(len(losses.buckets), True)
    return np.array(
        [b.start < curve.span.stop and b.stop > curve.span.start for b in losses.buckets]
    )


def _draw_changes(axis: Axes, losses: Losses) -> None:
    from matplotlib.ticker import NullLocator

    first, edges = losses.curves[0], _edges(losses)
    axis.axhline(0, **style_of(losses, first), label=_label(losses, first))
    middles, reach = (edges[:-1] + edges[1:]) / 2, [0.0]
    for curve in losses.curves[1:]:
        change, half = _changes(losses, curve)
        mine, style = _inside(losses, curve), style_of(losses, curve)
        followed = change[mine]
        reach += [*followed[np.isfinite(followed)]]
        if curve.span is None:
            axis.plot(middles, change, label=_label(losses, curve), **style)
            axis.fill_between(
                middles, change - half, change + half, color=style["color"], alpha=0.16, linewidth=0
            )
        else:
            axis.plot(middles, change, color=style["color"], linewidth=0.7, alpha=0.7)
            strong = np.where(mine, change, np.nan)
            axis.plot(middles, strong, label=_label(losses, curve), **style)
    low, high = min(reach) * _FAR - 1, max(reach) * _FAR + 1
    axis.set_yscale("symlog", linthresh=_NEAR, linscale=1.2)
    ticks = [tick for tick in _TICKS if tick <= max(-low, high)]
    shown = [t for t in (*(-tick for tick in ticks[::-1]), 0, *ticks) if low <= t <= high]
    axis.set_yticks(shown, [f"{tick:+d}" if tick else "0" for tick in shown], fontsize=8)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylim(low, high)
    axis.set_ylabel(f"loss against {shorten(first.name, _NAME)}, %")
    axis.set_title(
        "Change of the denoising loss (below 0 is better; logarithmic beyond 5 %)",
        fontsize=10,
        loc="left",
    )
    _mark_ranges(axis, losses)


def _draw_losses(axis: Axes, losses: Losses) -> None:
    edges = _edges(losses)
    middles = (edges[:-1] + edges[1:]) / 2
    for curve in losses.curves:
        shown = np.where(_inside(losses, curve), curve.losses, np.nan)
        axis.plot(middles, shown, label=_label(losses, curve), **style_of(losses, curve))
    axis.set_yscale("log")
    axis.set_ylabel("mean squared error")
    axis.set_title("Denoising loss, experts in their ranges", fontsize=10, loc="left")
    _mark_ranges(axis, losses)


def _mark_ranges(axis: Axes, losses: Losses) -> None:
    open_axis(axis)
    axis.set_xlim(0, losses.buckets[-1].stop)
    axis.set_xlabel("timestep t (0 = clean)")
    for span in losses.ranges[1:]:
        axis.axvline(span.start, color=LINE, linewidth=0.8, linestyle=(0, (4, 3)))


def _draw_table(axis: Axes, losses: Losses) -> None:
    """Change by range in per cent, a row per model; the last column is over all timesteps."""
    first, rows = losses.curves[0], losses.curves[1:]
    if not rows:
        axis.set_axis_off()
        return
    scales = [100 / loss for loss in (*first.range_losses, first.loss)]
    found = [[*curve.by_range, curve.overall] for curve in rows]
    values = np.array([[one.mean * s for one, s in zip(row, scales, strict=True)] for row in found])
    limit = float(np.clip(np.nanquantile(np.abs(values), 0.8), 0.5, 100))
    axis.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        dark = abs(value) > 0.62 * limit
        color = "white" if dark else "black" if found[y][x].is_told_from_zero else "0.5"
        axis.text(x, y, f"{value:+.1f}", ha="center", va="center", color=color, fontsize=8)
    names = [*map(str, losses.ranges), "all"]
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=0 if len(names) < 7 else 35)
    axis.set_yticks(range(len(rows)), [shorten(c.name, _NAME) for c in rows], fontsize=8)
    axis.axvline(len(names) - 1.5, color="white", linewidth=3)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("Change by range, % (grey: within its interval)", fontsize=10, loc="left")


def _label(losses: Losses, curve: Curve) -> str:
    name = shorten(curve.name, _NAME)
    return f"{name}, {curve.span}" if curve.span is not None else name
