"""The picture of a landscape: contours of the loss against the origin's, a panel per range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import BLACK, DIVERGING, color_of, render, shorten
from deme_cli.console import decimals, fixed, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ORIGIN, _LOWEST = ("o", "white", 42), ("*", "#F0E442", 110)  # marker, colour, size
_MARKERS = "sD^vPX<>"


def percent_of(row: dict[str, Any], name: str = "percent", sign: bool = True) -> str:
    """As `-1.9 ± 0.3`."""
    value, interval = row[name], row[f"{name}_interval"]
    digits = decimals([interval], 2) if interval else decimals([value], 4)
    return f"{(signed if sign else fixed)(value, digits)} ± {fixed(interval, digits)}"


def draw_landscape(
    result: dict[str, Any], axes: Sequence[np.ndarray], labels: Sequence[str], *, title: str,
    foot: str,
) -> list[bytes]:  # fmt: skip
    """Contours of the loss against the origin's: a panel for all timesteps and one per range.

    One scale of colours: blue is better than the origin, red is worse, in steps that grow 1, 2, 5,
    10, so that the shape shows near the origin and far from it; the thick line joins the points
    that are as good.
    """
    losses = np.array([row["loss"] for row in result["losses"]])
    row, column = (int(np.flatnonzero(axis == 0)[0]) for axis in axes)
    percent = 100 * (losses / losses[:, row, column][:, None, None] - 1)
    levels, count = contour_levels(percent), len(losses)
    side = math.ceil(math.sqrt(count + 1))  # one place for the legend
    shapes = [(math.ceil((count + 1) / columns), columns) for columns in (side, side + 1)]
    rows, columns = min(shapes, key=lambda shape: shape[0] * shape[1])
    x, y = axes
    ratio = (x[-1] - x[0]) / (y[-1] - y[0])
    width, height = 2.75 * min(1, max(ratio, 0.72)), 2.75 * min(1, max(1 / ratio, 0.6))

    def draw(figure: Figure) -> None:
        sheet = figure.subfigures(squeeze=False)[0, 0]  # whose labels are one for all panels
        sheet.supxlabel(labels[0], fontsize=8.5)
        sheet.supylabel(labels[1], fontsize=8.5)
        panels = sheet.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        flat = list(panels.flat)
        drawn = [_contours(flat[g], axes, percent[g], levels) for g in range(count)]
        for g in range(count):
            _mark(flat[g], result["models"], result["lowest"][g]["coordinates"])
            _title(flat[g], result["origin"][g], result["lowest"][g], is_whole=g == 0)
            flat[g].tick_params(labelbottom=True, labelleft=g % columns == 0)
        for axis in flat[count:]:
            axis.set_axis_off()
        blank = "\ngrey: not finite" if np.isnan(losses).any() else ""
        handles, names = flat[0].get_legend_handles_labels()
        flat[count].legend(
            handles, names, loc="center", frameon=False, fontsize=8, title_fontsize=8,
            title=f"thick line: as good as the origin\nblue: better, red: worse{blank}",
        )  # fmt: skip
        bar = sheet.colorbar(drawn[0], ax=flat, ticks=levels, fraction=0.05, pad=0.015, aspect=32)
        shown = [f"{level:+g}" if level else "0" for level in levels]
        bar.ax.set_yticks(levels, shown, fontsize=7.5)
        bar.ax.minorticks_off()
        bar.set_label("denoising loss against the origin's, %", fontsize=8.5)

    size = (width * columns + 1.9, (height + 0.8) * rows + 1.0)
    return render(draw, size=size, title=title, foot=foot)


def contour_levels(percent: np.ndarray) -> np.ndarray:
    """Levels in per cent, symmetric around 0, in steps of 1, 2, 5, 10.

    From half the depth of what is better than the origin, in the group where it is least, to what
    nine in ten points reach.
    percent: (G, points, points), nan where not finite
    """
    depths = np.array([-np.nanmin(one) for one in percent])
    depth = depths[depths > 0].min() / 2 if (depths > 0).any() else 0.0
    top = float(np.nanquantile(np.abs(percent), 0.9))
    low = float(np.clip(depth, max(top / 300, 1e-6), max(top / 4, 1e-5)))
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(max(top, low))) + 2)
    steps = [mantissa * 10.0**exponent for exponent in exponents for mantissa in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= low * (1 + 1e-9))
    last = next(i for i, step in enumerate(steps) if step >= max(top, low) * (1 - 1e-9))
    positive = np.array(steps[first : max(last, first + 1) + 1])
    return np.concatenate([-positive[::-1], [0.0], positive])


def _contours(
    axis: Axes, axes: Sequence[np.ndarray], percent: np.ndarray, levels: np.ndarray
) -> Any:
    from matplotlib.colors import BoundaryNorm

    norm = BoundaryNorm(levels, 256, extend="both")
    x, y = axes
    values = np.ma.masked_invalid(percent.T)
    axis.set_facecolor("0.8")  # where the loss is not finite
    filled = axis.contourf(x, y, values, levels, cmap=DIVERGING, norm=norm, extend="both")
    filled.set_rasterized(True)
    lines = levels[(levels != 0) & (levels > values.min()) & (levels < values.max())]
    if len(lines):
        axis.contour(x, y, values, lines, colors="0.25", linewidths=0.45, linestyles="solid")
    if values.min() < 0 < values.max():
        axis.contour(x, y, values, [0.0], colors=BLACK, linewidths=1.3)
    axis.set_aspect("equal")
    axis.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    return filled


def _mark(axis: Axes, models: Sequence[dict[str, Any]], lowest: Sequence[float]) -> None:
    """The origin, the other models where they lie, the lowest point of this panel."""
    style: dict[str, Any] = {"edgecolors": BLACK, "linewidths": 0.9, "zorder": 5, "clip_on": False}
    marker, color, size = _ORIGIN
    name = f"{models[0]['name']} (origin)"
    axis.scatter(0, 0, s=size, c=color, marker=marker, label=name, **style)
    for number, row in enumerate(models[1:]):
        color, name = color_of(number), shorten(row["name"], 18)
        look = {**style, "c": color}
        if row["distance_from_landscape"]:
            name += f", {row['distance_from_landscape']:.2g} off the plane"
            look |= {"c": "white", "edgecolors": color, "linewidths": 1.6}
        marker = _MARKERS[number % len(_MARKERS)]
        x, y = row["coordinates"]
        axis.scatter(x, y, s=40, marker=marker, label=name, **look)
    marker, color, size = _LOWEST
    x, y = lowest
    axis.scatter(x, y, s=size, c=color, marker=marker, label="lowest point", **style)


def _title(axis: Axes, origin: dict[str, Any], lowest: dict[str, Any], *, is_whole: bool) -> None:
    name = "all timesteps" if is_whole else f"timesteps {origin['timesteps']}"
    slope = percent_of(origin, "slope_percent", sign=False)
    told = f"{percent_of(lowest)} %" if any(lowest["coordinates"]) else "the origin"
    axis.set_title(
        f"{name}\nslope at the origin {slope} % per unit\n"
        f"lowest: {told}{', at the edge' if lowest['at_edge'] else ''}",
        fontsize=8,
    )
