"""The picture of a landscape: contours of the loss against the origin's, or curves along a line.

On a plane one panel for all timesteps and one per range, in one scale of colours: blue is better
than the origin, red is worse, in steps that grow 1, 2, 5, 10, so that the shape shows near the
origin and far from it; the thick line joins the points that are as good.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import BLACK, DIVERGING, color_of, open_axis, render, shorten
from deme_cli.analysis.landscape.found import Landscape, digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ORIGIN, _LOWEST = ("o", "white", 42), ("*", "#F0E442", 110)  # marker, colour, size
_MARKERS = "sD^vPX<>"
_BLANK = "0.8"  # where the loss is not finite


def draw_landscape(found: Landscape, labels: list[str], *, title: str, foot: str) -> list[bytes]:
    """The picture in each of `figure.FORMATS`.  labels: of the axes"""
    if len(found.axes) == 1:
        return render(
            lambda figure: _draw_line(figure, found, labels[0]), size=(11, 4.6), title=title,
            foot=foot,
        )  # fmt: skip
    rows, columns = _shape(len(found.groups) + 1)  # one place for the legend
    x, y = found.axes
    ratio = (x[-1] - x[0]) / (y[-1] - y[0])
    width, height = 2.75 * min(1, max(ratio, 0.72)), 2.75 * min(1, max(1 / ratio, 0.6))
    return render(
        lambda figure: _draw_plane(figure, found, labels, (rows, columns)),
        size=(width * columns + 1.9, (height + 0.8) * rows + 1.0), title=title, foot=foot,
    )  # fmt: skip


def _shape(count: int) -> tuple[int, int]:
    """Rows and columns of so many panels: about square, with few places left empty."""
    side = math.ceil(math.sqrt(count))
    shapes = [(math.ceil(count / columns), columns) for columns in (side, side + 1)]
    return min(shapes, key=lambda shape: shape[0] * shape[1])


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


def _draw_plane(
    figure: Figure, found: Landscape, labels: list[str], shape: tuple[int, int]
) -> None:
    sheet = figure.subfigures(squeeze=False)[0, 0]  # whose labels are one for all panels
    sheet.supxlabel(labels[0], fontsize=8.5)
    sheet.supylabel(labels[1], fontsize=8.5)
    axes = sheet.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    flat, count = list(axes.flat), len(found.groups)
    percent = found.percent
    levels = contour_levels(percent)
    drawn = [_contours(flat[g], found, percent[g], levels) for g in range(count)]
    for g in range(count):
        _mark(flat[g], found, g)
        _title(flat[g], found, g)
        flat[g].tick_params(labelbottom=True, labelleft=g % shape[1] == 0)
    for axis in flat[count:]:
        axis.set_axis_off()
    _legend(flat[count], flat[0], found)
    bar = sheet.colorbar(drawn[0], ax=flat, ticks=levels, fraction=0.05, pad=0.015, aspect=32)
    bar.ax.set_yticks(levels, [_signed(level) for level in levels], fontsize=7.5)
    bar.ax.minorticks_off()
    bar.set_label("denoising loss against the origin's, %", fontsize=8.5)


def _contours(axis: Axes, found: Landscape, percent: np.ndarray, levels: np.ndarray) -> Any:
    from matplotlib.colors import BoundaryNorm

    norm = BoundaryNorm(levels, 256, extend="both")
    x, y = found.axes
    values = np.ma.masked_invalid(percent.T)
    axis.set_facecolor(_BLANK)
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


def _mark(axis: Axes, found: Landscape, group: int) -> None:
    """The origin, the other models where they lie, the lowest point of this panel."""
    style: dict[str, Any] = {"edgecolors": BLACK, "linewidths": 0.9, "zorder": 5, "clip_on": False}
    marker, color, size = _ORIGIN
    name = f"{found.models[0].name} (origin)"
    axis.scatter(0, 0, s=size, c=color, marker=marker, label=name, **style)
    for number, seen in enumerate(found.models[1:]):
        x, y = seen.coordinates
        color, name = color_of(number), shorten(seen.name, 18)
        look = {**style, "c": color}
        if seen.distance:
            name += f", {digits(seen.distance)} off the plane"
            look |= {"c": "white", "edgecolors": color, "linewidths": 1.6}
        axis.scatter(x, y, s=40, marker=_MARKERS[number % len(_MARKERS)], label=name, **look)
    marker, color, size = _LOWEST
    x, y = found.lowest[group].coordinates
    axis.scatter(x, y, s=size, c=color, marker=marker, label="lowest point", **style)


def _title(axis: Axes, found: Landscape, group: int) -> None:
    span, pick = found.groups[group], found.lowest[group]
    name = "all timesteps" if group == 0 else f"timesteps {span}"
    told = f"lowest: {pick.shown}" if any(pick.coordinates) else "lowest: the origin"
    slope, interval = found.steepness[group], found.steepness_intervals[group]
    axis.set_title(
        f"{name}\nslope at the origin {digits(slope)} ± {digits(interval)} % per unit\n"
        f"{told}{', at the edge' if pick.at_edge else ''}",
        fontsize=8,
    )


def _legend(axis: Axes, of: Axes, found: Landscape) -> None:
    handles, names = of.get_legend_handles_labels()
    axis.legend(
        handles, names, loc="center", frameon=False, fontsize=8, title_fontsize=8,
        title="thick line: as good as the origin\nblue: better, red: worse"
        + ("\ngrey: not finite" if found.num_not_finite else ""),
    )  # fmt: skip


def _draw_line(figure: Figure, found: Landscape, label: str) -> None:
    left, right = figure.subplots(1, 2)
    a = found.axes[0]
    start, stop = (int(np.flatnonzero(a == end)[0]) for end in (0.0, 1.0))
    ends = np.outer(found.losses[:, start], 1 - a) + np.outer(found.losses[:, stop], a)
    over = np.where((a >= 0) & (a <= 1), 100 * (found.losses / ends - 1), np.nan)
    for group, span in enumerate(found.groups):
        style = {"color": BLACK, "linewidth": 2.2} if group == 0 else _line_style(group - 1)
        name = "all timesteps" if group == 0 else str(span)
        left.plot(a, found.percent[group], label=name, **style)
        right.plot(a, over[group], label=name, **style)
        top = found.barriers[group]
        right.errorbar(
            top.coordinates, [top.percent], [top.percent_interval], fmt="o", markersize=4,
            capsize=2.5, color=style["color"], linewidth=1,
        )  # fmt: skip
    first = shorten(found.models[0].name, 24)
    for axis in (left, right):
        open_axis(axis)
        axis.axhline(0, color="0.25", linewidth=0.8)
        axis.set_xlabel(label)
        for end in (0, 1):
            axis.axvline(end, color="0.25", linewidth=0.8, linestyle=(0, (4, 3)))
    left.set_ylabel(f"denoising loss against that of {first}, %")
    left.set_title("Loss along the line; dashed: its ends", fontsize=9.5)
    right.set_ylabel("over the straight line between the ends, %")
    right.set_title("Barrier; dots: its top on fresh draws, ± 95 %", fontsize=9.5)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _limit(left, found.percent)


def _signed(level: float) -> str:
    return f"{level:+g}" if level else "0"


def _line_style(number: int) -> dict[str, Any]:
    dashed = (number // 6) % 2 == 1
    return {"color": color_of(number), "linewidth": 1.4, "linestyle": "--" if dashed else "-"}


def _limit(axis: Axes, percent: np.ndarray) -> None:
    """Linear, but logarithmic outwards where ranges would hide what all timesteps do."""
    whole, most = np.nanmax(np.abs(percent[0])), np.nanmax(np.abs(percent))
    if 0 < whole < most / 10:
        axis.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(whole)))
        axis.yaxis.set_major_formatter(lambda value, place: _signed(value))
