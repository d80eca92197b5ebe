"""The picture of gradients: how alike those of any two timesteps are, and how far to trust it.

On the left the cosines, red where two timesteps pull the same way, blue where they pull against
each other, with the suggested ranges. On the right, over the same timesteps, the reliability of
each bucket and the norm of its gradient.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from deme_cli.training.affinity import Affinity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = "RdBu_r"  # told apart by all common kinds of colour vision
FORMATS = ("png", "svg")
_BLUE, _ORANGE, _LINE = "#0072B2", "#D55E00", "0.25"


def draw_gradients(affinity: Affinity) -> list[bytes]:
    """The picture in each of FORMATS."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "deme"}):
        figure = Figure(figsize=(10.4, 5.2), layout="constrained", dpi=160)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1])
        _draw_cosines(figure, figure.add_subplot(grid[:, 0]), affinity)
        upper = figure.add_subplot(grid[0, 1])
        _draw_reliability(upper, affinity)
        _draw_norms(figure.add_subplot(grid[1, 1], sharex=upper), affinity)
        upper.tick_params(labelbottom=False)
        figure.suptitle(_title(affinity), fontsize=10)
        drawn = []
        for kind in FORMATS:
            stream = io.BytesIO()
            figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)
            drawn.append(stream.getvalue())
    return drawn


def _title(affinity: Affinity) -> str:
    names = f"{affinity.model['source']} on {affinity.data['source']}"
    names = names if len(names) <= 70 else f"…{names[-69:]}"
    buckets = f"{len(affinity.buckets)} buckets of {affinity.num:,} draws"
    return f"Gradients of the denoising loss: {names}, {buckets}"


def _edges(affinity: Affinity) -> np.ndarray:
    return np.array([0, *(bucket.stop for bucket in affinity.buckets)])


def _draw_cosines(figure: Figure, axis: Axes, affinity: Affinity) -> None:
    edges, values = _edges(affinity), np.array(affinity.cosines)
    limit = _limit(values)
    mesh = axis.pcolormesh(
        edges, edges, values, cmap=COLORS, vmin=-limit, vmax=limit, rasterized=True
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


def _draw_reliability(axis: Axes, affinity: Affinity) -> None:
    edges = _edges(affinity)
    axis.stairs(affinity.reliability, edges, color=_BLUE, linewidth=1.4, baseline=None)
    axis.set_ylim(min(0.0, *affinity.reliability) - 0.03, 1.03)
    axis.set_ylabel("cosine of two halves")
    axis.set_title("Reliability: agreement of two halves of a bucket's draws", fontsize=9)
    _mark_ranges(axis, affinity)


def _draw_norms(axis: Axes, affinity: Affinity) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.stairs(affinity.norms, _edges(affinity), color=_ORANGE, linewidth=1.4, baseline=None)
    if max(affinity.norms) > 10 * min(affinity.norms) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)
    axis.set(xlabel="timestep t (0 = clean)", ylabel="norm of the gradient")
    axis.set_title("Norm of the mean gradient", fontsize=9)
    axis.set_xlim(0, affinity.buckets[-1].stop)
    _mark_ranges(axis, affinity)


def _mark_ranges(axis: Axes, affinity: Affinity) -> None:
    for span in affinity.ranges[1:]:
        axis.axvline(span.start, color=_LINE, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.grid(axis="y", color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
