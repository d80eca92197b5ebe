"""How the figures look: one palette, one size of type, and a PNG and an SVG of each."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
DIVERGING, SEQUENTIAL = "RdBu_r", "cividis"  # told apart by all common kinds of colour vision
BLACK, BLUE, VERMILION = "#000000", "#0072B2", "#D55E00"
BASE, ENSEMBLE, MERGED, OTHER, LINE = "0.45", BLACK, VERMILION, "#F0A000", "0.25"
# Experts in order of their ranges (Okabe and Ito, from clean to noise); more begin anew, dashed.
EXPERTS = ("#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#8C6D31")
_LONGEST = 90  # characters of a title


def shorten(text: str, length: int) -> str:
    """At most `length` characters of a text: its beginning and its end, the end longer."""
    if len(text) <= length:
        return text
    head = (length - 1) // 3
    return f"{text[:head]}…{text[head + 1 - length :]}"


def render(
    draw: Callable[[Figure], None], *, size: tuple[float, float], title: str, foot: str = ""
) -> list[bytes]:
    """What `draw` puts into a figure of `size` inches, in each of FORMATS.

    title: what is seen, of which model. foot: the protocol, in small type.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "deme"}):
        figure = Figure(figsize=size, layout="constrained", dpi=160)
        FigureCanvasAgg(figure)
        draw(figure)
        figure.suptitle(shorten(title, _LONGEST), fontsize=11)
        if foot:
            figure.supxlabel(foot, fontsize=7.5, color="0.35")
        for text in figure.findobj(Text):
            if isinstance(text, Text) and "$" in text.get_text():
                text.set_parse_math(False)  # the name of a file; the numbers of axes come later
        drawn = []
        for kind in FORMATS:
            stream = io.BytesIO()
            figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)
            drawn.append(stream.getvalue())
    return drawn


def color_of(index: int) -> str:
    """The colour of expert `index`, counted from 0 in order of ranges."""
    return EXPERTS[index % len(EXPERTS)]


def open_axis(axis: Axes, *, grid: Literal["x", "y", "both"] = "y") -> None:
    """Without a frame on top and right, with a light grid behind what is drawn."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="0.92")
    axis.set_axisbelow(True)
