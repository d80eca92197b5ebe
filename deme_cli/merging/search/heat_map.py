"""The picture of coefficients that differ between groups of tensors: experts by blocks or layers.

One row per group in the order of the network, one column per expert, colours centred at 0: red adds
an expert's task vector, blue subtracts it. Many groups go on in a strip beside the first; where
even those are full, rows get thin and only some are named.
N experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from deme_cli.merging.search.figure import to_png
from deme_cli.merging.search.space import REST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_INCHES, LEAST_ROW_INCHES = 0.26, 0.14  # of few rows, and down to which rows shrink
GROWN_INCHES, MOST_INCHES = 7.0, 16.0  # height from which rows shrink, and the picture's
MOST_ROWS, MOST_STRIPS = 90, 4  # rows from which another strip begins beside the first
NAME_LENGTH = 64  # characters
COLORS = "RdBu_r"
# How the names of parts begin, in the order of the network; of the others those with `out` in them
# come last, the rest with the input.
_STAGES = (
    "down_blocks", "mid_block", "transformer_blocks", "single_transformer", "blocks", "up_blocks",
)  # fmt: skip


def draw_heat_map(
    by_group: Mapping[str, Sequence[float]], experts: Sequence[str], *, title: str = "",
    means: Sequence[float] | None = None,
) -> bytes:  # fmt: skip
    """Coefficients of each group (N,), by its glob, as a PNG.

    means: the one number per expert (N,) that the whole is summed up in, shown under its name.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    groups = sorted(by_group, key=network_order)
    strips = min(math.ceil(len(groups) / MOST_ROWS), MOST_STRIPS)
    rows = math.ceil(len(groups) / strips)
    row = _row_inches(rows)
    names = [shorten(group_name(group), NAME_LENGTH) for group in groups]
    points = min(9.0, max(row * 44, 6.0))  # size of the type
    cells = (0.38 if strips > 1 else 0.62) * max(len(experts), 2)
    wide = strips * (0.3 + 0.0085 * points * max(map(len, names)) + cells)
    tall = row * rows + 1.3
    values = np.array([by_group[group] for group in groups], dtype=float)  # (groups, N)
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(wide + 1.2, tall), layout="constrained", dpi=160)
        axes = figure.subplots(1, strips, squeeze=False)[0]
        for strip, axis in enumerate(axes):
            own = slice(strip * rows, (strip + 1) * rows)
            _draw_strip(axis, values[own], largest, row)
            _name_rows(axis, names[own], row, points)
            _name_columns(axis, experts, means)
            axis.set_ylim(rows - 0.5, -0.5)
        bar = figure.colorbar(
            ScalarMappable(Normalize(-largest, largest), COLORS), ax=axes, fraction=0.3 / wide,
            pad=0.2 / wide, aspect=20, shrink=min(1.0, 4.0 / tall), anchor=(0.0, 1.0),
        )  # fmt: skip
        bar.set_label("coefficient w")
        bar.outline.set_visible(False)
        figure.suptitle(title, fontsize=9)
        return to_png(figure)


def group_name(glob: str) -> str:
    """A group as people call it: `mid_block.*` is mid_block, `*` the rest."""
    return "rest" if glob == REST else glob.removesuffix(".*")


def shorten(text: str, length: int) -> str:
    """At most `length` characters of a text: its beginning and its end, the end longer."""
    if len(text) <= length:
        return text
    head = (length - 1) // 3
    return f"{text[:head]}…{text[head + 1 - length :]}"


def network_order(glob: str) -> tuple:
    """A key that sorts groups as the data passes them: input, down, mid, up, output, the rest."""
    if glob == REST:
        return (len(_STAGES) + 1, ())
    top = glob.split(".")[0]
    outside = len(_STAGES) if "out" in top else -1
    stage = next((i for i, part in enumerate(_STAGES) if top.startswith(part)), outside)
    parts = [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", glob)]
    return (stage, tuple(parts))


def _row_inches(count: int) -> float:
    """The height of one of `count` rows: as of few, then smaller, then what fits on the page."""
    grown = min(ROW_INCHES, max(GROWN_INCHES / count, LEAST_ROW_INCHES))
    return min(grown, MOST_INCHES / count)


def _name_columns(axis: Axes, experts: Sequence[str], means: Sequence[float] | None) -> None:
    names = list(experts)
    if means is not None:
        names = [f"{name}\nmean {w:.2g}" for name, w in zip(names, means, strict=True)]
    axis.xaxis.tick_top()
    axis.set_xticks(range(len(names)), names, fontsize="small")
    axis.set_xticks(np.arange(1, len(names)) - 0.5, minor=True)
    axis.grid(which="minor", axis="x", color="white", linewidth=1.5)
    axis.tick_params(which="both", axis="x", length=0)
    axis.spines[:].set_visible(False)


def _name_rows(axis: Axes, names: Sequence[str], row: float, points: float) -> None:
    """Every row's name, or every k-th where rows are thinner than a line of text."""
    every = math.ceil(0.1 / row)
    places = range(0, len(names), every)
    axis.set_yticks(places, [names[i] for i in places], fontsize=points)
    if every > 1:
        axis.tick_params(axis="y", length=2)


def _draw_strip(axis: Axes, values: np.ndarray, largest: float, row: float) -> None:
    """The cells of some groups with their numbers, where these fit; white on dark colours."""
    axis.imshow(values, cmap=COLORS, vmin=-largest, vmax=largest, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if row >= LEAST_ROW_INCHES and math.isfinite(value):
            text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0 makes 0 of -0
            color = "white" if abs(value) > 0.65 * largest else "black"
            size = min(8.0, row * 42)
            axis.text(x, y, text, ha="center", va="center", fontsize=size, color=color)
