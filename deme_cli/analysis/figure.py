"""How the figures look: one palette, one size of type. And the picture that ends the demo."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deme_cli.artifacts import load_tensors
from deme_cli.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIVERGING = "RdBu_r"  # red is more; told apart by all common kinds of colour vision
BLACK, BLUE, VERMILION = "#000000", "#0072B2", "#D55E00"
BASE, ENSEMBLE, MERGED, OTHER, LINE = "0.45", BLACK, VERMILION, "#F0A000", "0.25"
# Experts in order of their ranges (Okabe and Ito, from clean to noise); more begin anew, dashed.
EXPERTS = ("#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#8C6D31")
EDGE: dict[str, Any] = {"color": LINE, "linewidth": 0.8, "linestyle": (0, (4, 3))}  # of ranges
_LONGEST = 90  # characters of a title
_DEMO_COLUMNS = 12  # images of each model


def shorten(text: str, length: int) -> str:
    """At most `length` characters of a text: its beginning and its end, the end longer."""
    if len(text) <= length:
        return text
    head = (length - 1) // 3
    return f"{text[:head]}…{text[head + 1 - length :]}"


def render(
    draw: Callable[[Figure], None], *, size: tuple[float, float], title: str, foot: str = "",
    kind: str = "png",
) -> bytes:  # fmt: skip
    """What `draw` puts into a figure of `size` inches, as PNG or SVG.

    title: what is seen, of which model. foot: the protocol, in small type.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "deme"}):
        figure = Figure(figsize=size, layout="constrained", dpi=160)
        draw(figure)
        figure.suptitle(shorten(title, _LONGEST), fontsize=11)
        if foot:
            figure.supxlabel(foot, fontsize=7.5, color="0.35")
        for text in figure.findobj(Text):
            if isinstance(text, Text) and "$" in text.get_text():
                text.set_parse_math(False)  # the name of a file; the numbers of axes come later
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()


def color_of(index: int) -> str:
    """The colour of expert `index`, counted from 0 in order of ranges."""
    return EXPERTS[index % len(EXPERTS)]


def open_axis(axis: Axes, *, grid: Literal["x", "y", "both"] = "y") -> None:
    """Without a frame on top and right, with a light grid behind what is drawn."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="0.92")
    axis.set_axisbelow(True)


@dataclass(frozen=True)
class DemoRow:
    """One model of `deme demo`: its samples artifact, distances per seed, losses per range."""

    name: str
    samples: Path
    distances: Sequence[float]
    losses: Sequence[float]


def draw_demo(
    rows: Sequence[DemoRow], ranges: Sequence[str], path: Path, *, metric: str, protocol: str
) -> None:
    """Write the PNG that ends `deme demo`; the first row is the base.

    Images of each model from the same starting noise; the distance of each row per evaluation seed,
    lines joining the same seed; the held-out loss by range against the base's.
    """

    def draw(figure: Figure) -> None:
        upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.15], squeeze=False)[:, 0]
        for axis, row in zip(upper.subplots(len(rows), 1), rows, strict=True):
            images = load_tensors(row.samples)["images"][:_DEMO_COLUMNS].numpy()
            padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
            axis.imshow(np.concatenate(list(padded), axis=1).squeeze(-1), cmap="gray")
            axis.set_ylabel(row.name, rotation=0, ha="right", va="center", fontsize=10)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        left, right = lower.subplots(1, 2, width_ratios=[1.1, 1])
        _draw_distances(left, rows, metric)
        _draw_by_range(right, rows, ranges)

    title = "The same starting noise, denoised by each model"
    write_whole(path, [render(draw, size=(11, 7.2), title=title, foot=protocol)])


def _draw_distances(axis: Axes, rows: Sequence[DemoRow], metric: str) -> None:
    values, names = np.array([row.distances for row in rows]), [row.name for row in rows]
    means = values.mean(1)  # of (rows, seeds)
    axis.plot(names, values, color="0.75", linewidth=1, marker="o", markerfacecolor=BLUE)
    axis.scatter(names, means, marker="_", s=900, color="black", zorder=3)
    for x, mean in enumerate(means):
        axis.annotate(f"{mean:.3f}", (x, mean), (0, 9), textcoords="offset points", ha="center")
    axis.margins(x=0.15, y=0.15)
    axis.set_ylabel(f"{metric} (lower is better)")
    axis.set_title("Distance to real digits: a dot per seed, bar = mean", fontsize=11)
    open_axis(axis)


def _draw_by_range(axis: Axes, rows: Sequence[DemoRow], ranges: Sequence[str]) -> None:
    losses = np.array([row.losses for row in rows])
    change = 100 * (losses / losses[0] - 1)  # per cent
    limit = max(np.abs(change).max(), 0.1)
    axis.imshow(change, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    for (y, x), value in np.ndenumerate(change):
        color = "white" if abs(value) > 0.6 * limit else "black"
        axis.text(x, y, f"{value:+.1f}", ha="center", va="center", color=color)
    axis.set_xticks(range(len(ranges)), ranges)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.set_xlabel("timesteps t (0 = clean)")
    axis.set_title("Held-out loss against the base, %", fontsize=11)
