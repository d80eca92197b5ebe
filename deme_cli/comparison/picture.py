"""The picture of a comparison: a panel per column, a line per row, a dot per training seed.

A large marker is the mean of a row, with the 95 % interval of that mean over training seeds; it is
hollow where there is only one training seed, and so no interval. The dashed line is the first row,
the band around it its sd over evaluation seeds. Published figures are not drawn: another protocol.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli.analysis.figure import BLACK, BLUE, OTHER, VERMILION
from deme_cli.comparison.figures import Cell, Column, Comparison, RowResult, cell_of, state_of
from deme_cli.files import write_whole

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {  # marker, colour, legend
    "base": ("D", BLACK, "base"),
    "finetune": ("o", BLUE, "finetuned, one network"),
    "ensemble": ("s", OTHER, "ensemble of experts"),
    "merged": ("^", VERMILION, "merged experts"),
}
MISSING = "0.55"
MOST_ABREAST, PANEL_INCHES, ROW_INCHES, LEGEND_INCHES = 3, 3.3, 0.34, 2.8
WIDE_SPREAD = 8.0  # largest over least value from which an axis is logarithmic
LONGEST_REACH = 0.6  # of the spread of all dots: how far beyond them an interval is followed
NAME_LETTERS = 30
DROP = 0.22  # of a row: how far below its mean the dots of its seeds lie


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Write the picture: SVG where `path` ends in .svg, else PNG."""
    is_svg = path.suffix.lower() == ".svg"
    stream = io.BytesIO()
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "deme"}):
        figure = _figure(comparison)
        if is_svg:
            figure.savefig(stream, format="svg", metadata={"Date": None})
        else:
            figure.savefig(stream, format="png")
    write_whole(path, [stream.getvalue()])


def _figure(comparison: Comparison) -> Figure:
    """Title and legend on top, panels, and what the figures depend on at the foot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns, rows = comparison.columns, comparison.rows
    count = max(len(columns), 1)
    abreast = count if count <= MOST_ABREAST else min(math.ceil(count / 2), MOST_ABREAST)
    down = math.ceil(count / abreast)
    width = max(PANEL_INCHES * abreast + 2.2, 7.2)
    title = _wrapped(comparison.title, width, points=12)
    foot = _wrapped(" · ".join(comparison.protocol), width, points=7)
    handles, across = _legend(comparison), int(width / LEGEND_INCHES)
    head = 0.15 + 0.22 * _lines(title) + 0.17 * math.ceil(len(handles) / across)
    below = 0.1 + 0.12 * _lines(foot)
    height = head + down * (ROW_INCHES * (len(rows) + 1) + 0.65) + below
    panels = (0, below / height, 1, 1 - (head + below) / height)
    layout = ConstrainedLayoutEngine(rect=panels, w_pad=0.1)
    figure = Figure(figsize=(width, height), layout=layout, dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, abreast, squeeze=False, sharey=True)
    _draw_panels(axes, comparison)
    left, top = 0.1 / width, 1 - 0.08 / height
    figure.text(left, top, title, fontsize=12, va="top")
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, top - 0.22 * _lines(title) / height),
        ncols=across, fontsize=8, frameon=False, borderpad=0.2,
    )  # fmt: skip
    figure.text(left, 0.07 / height, foot, fontsize=7, color="0.4", va="bottom")
    return figure


def _draw_panels(axes: np.ndarray, comparison: Comparison) -> None:
    """A panel per column; a word where nothing is measured."""
    for axis, column in zip_longest(axes.flat, comparison.columns):
        if column is None:
            axis.set_axis_off()
        else:
            _draw_panel(axis, column, comparison.rows)
    if comparison.columns:
        _name_rows([line[0] for line in axes], comparison.rows)
    else:
        axes[0][0].text(0.5, 0.5, "nothing is measured yet", ha="center", color=MISSING)


def _draw_panel(axis: Axes, column: Column, rows: Sequence[RowResult]) -> None:
    cells = [cell_of(row, column, rows[0]) for row in rows]
    low, high, is_log = limits([cell for cell in cells if cell is not None])
    _scale(axis, low, high, is_log=is_log)
    if (first := cells[0]) is not None:
        axis.axvline(first.mean, color="0.45", linestyle="--", linewidth=1, zorder=1)
        if first.repeats_sd:
            ends = first.mean - first.repeats_sd, first.mean + first.repeats_sd
            axis.axvspan(*ends, color="0.9", linewidth=0, zorder=0)
    for y, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        if cell is None:
            word = state_of(row).strip("()") or "not measured"
            axis.text(
                0.5, y, word, transform=axis.get_yaxis_transform(), ha="center", va="center",
                color=MISSING, fontsize=8, fontstyle="italic", backgroundcolor="white",
            )  # fmt: skip
        else:
            _draw_row(axis, y, row, cell)
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axis.grid(axis="y", color="0.93", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    direction = "lower" if column.lower_is_better else "higher"
    axis.set_xlabel(f"{_literal(column.title)} ({direction} is better)", fontsize=9)


def _draw_row(axis: Axes, y: int, row: RowResult, cell: Cell) -> None:
    """The dots of a row, its mean, and the interval, with a caret where it leaves the panel."""
    marker, color, _ = KINDS[row.kind]
    low, high = axis.get_xlim()
    if cell.interval is not None:
        start, stop = cell.interval
        axis.plot([max(start, low), min(stop, high)], [y, y], color=color, linewidth=1.6, zorder=2)
        for is_cut, x, caret in (start < low, low, "<"), (stop > high, high, ">"):
            if is_cut:
                axis.plot(x, y, caret, color=color, markersize=5, clip_on=False, zorder=2)
        axis.plot(
            cell.seed_means, [y + DROP] * cell.num_seeds, ".", color=color, alpha=0.6, markersize=5,
            markeredgewidth=0, zorder=3,
        )  # fmt: skip
    axis.plot(
        cell.mean, y, marker, color=color, markersize=7, zorder=4,
        markerfacecolor="white" if _is_lone(row, cell) else color,
    )  # fmt: skip


def _is_lone(row: RowResult, cell: Cell) -> bool:
    """Whether a row that trains was trained from one seed, which tells nothing of its chance."""
    return cell.num_seeds == 1 and row.results[0].seed is not None


def limits(cells: Sequence[Cell]) -> tuple[float, float, bool]:
    """Where an axis starts and stops, and whether it is logarithmic.

    All dots are in; a long interval (two seeds make one of 9 sd) is cut, or it would hide them.
    """
    dots = [value for cell in cells for value in cell.seed_means if math.isfinite(value)]
    if not dots:
        return 0.0, 1.0, False
    is_log = 0 < WIDE_SPREAD * min(dots) < max(dots)
    to_axis, back = (_log, math.exp) if is_log else (float, float)
    low, high = to_axis(min(dots)), to_axis(max(dots))
    reach = LONGEST_REACH * (high - low) or 0.1 * abs(high) or 1.0
    ends = [to_axis(end) for cell in cells for end in cell.interval or ()]
    start = max(min([low, *ends]), low - reach)
    stop = min(max([high, *ends]), high + reach)
    margin = 0.04 * (stop - start) or reach
    return back(start - margin), back(stop + margin), is_log


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _scale(axis: Axes, low: float, high: float, *, is_log: bool) -> None:
    """The span of an axis, with few ticks that are plain numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    if is_log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.ticklabel_format(axis="x", useOffset=False)
    axis.set_xlim(low, high)
    axis.tick_params(labelsize=8)


def _name_rows(axes: Sequence[Axes], rows: Sequence[RowResult]) -> None:
    """Names at the left of each line of panels, grey where seeds are missing."""
    names = [f"{row.name} {state_of(row)}" if row.results else row.name for row in rows]
    for axis in axes:
        axis.set_yticks(range(len(rows)), [_literal(textwrap.fill(n, NAME_LETTERS)) for n in names])
        for label, row in zip(axis.get_yticklabels(), rows, strict=True):
            label.set(fontsize=8, color=MISSING if state_of(row) else "black")


def _legend(comparison: Comparison) -> list[Artist]:
    """What each mark means, of those that are drawn."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows, first = comparison.rows, comparison.rows[0]
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    handles: list[Artist] = [
        Line2D([], [], color=color, marker=marker, linestyle="none", label=label)
        for marker, color, label in map(KINDS.__getitem__, kinds)
    ]
    grey_line = partial(Line2D, [], [], color="0.45", linewidth=1.2)
    cells = [
        (row, cell)
        for row in rows
        for column in comparison.columns
        if (cell := cell_of(row, column, first)) is not None
    ]
    if any(cell.interval for _, cell in cells):
        handles += [
            Line2D([], [], marker=".", color="0.45", linestyle="none", label="one training seed"),
            grey_line(label="95 % interval over training seeds"),
        ]
    if any(_is_lone(row, cell) for row, cell in cells):
        label = "hollow: one training seed, no interval"
        handles.append(grey_line(marker="o", markerfacecolor="white", linestyle="", label=label))
    if any(row is first for row, _ in cells):
        handles.append(grey_line(linestyle="--", label="mean of the first row"))
    if any(row is first and cell.repeats_sd for row, cell in cells):
        handles.append(Patch(color="0.9", label="its sd over evaluation seeds"))
    return handles


def _wrapped(text: str, inches: float, *, points: float) -> str:
    """Lines of `text` that fit the width; a letter of DejaVu Sans is 0.6 of its height wide."""
    return _literal(textwrap.fill(text, int(0.96 * inches * 72 / (0.6 * points))))


def _lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _literal(text: str) -> str:
    """`text` as it stands, not as mathematics."""
    return text.replace("$", r"\$")
