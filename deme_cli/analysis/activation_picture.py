"""The picture of what finetuning did to the features (the paper's figure 2, for every block)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import (
    BLACK,
    BLUE,
    DIVERGING,
    LINE,
    SEQUENTIAL,
    VERMILION,
    open_axis,
    render,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Row = dict[str, Any]
_REST = "0.8"
_LOWEST = -0.05  # where an R^2 below it is drawn
_ROOM = 60  # characters of names beside each other under a wide axis
_SHORT = (
    (r"^single_transformer_blocks\.", "single "),
    (r"^(transformer_)?blocks\.", ""),
    (r"_blocks?\.", " "),
    (r"_block$", ""),
)


def draw_activations(document: dict[str, Any], drawn: Row, *, title: str, foot: str) -> list[bytes]:
    """Above, over the blocks in the network's order: which part of the variance of the change lies
    in channels, in places, in neither, with what a channel-wise map explains; and the differences
    of channel and spatial activations. Below, for the block `drawn`: the activations of base and
    expert and their differences, and how far projections are from the identity."""
    blocks = document["blocks"]

    def draw(figure: Figure) -> None:
        upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.08], squeeze=False)[:, 0]
        left, right = upper.subplots(1, 2, width_ratios=[1.15, 1])
        _draw_shares(left, blocks, len(document["controls"]))
        _draw_differences(right, blocks, 36 if document["controls"] else 24)
        _draw_block(lower, document["drawn"], drawn, [b for b in blocks if b["projection"]])

    return render(draw, size=(12.4, 7.8), title=title, foot=foot)


def short_name(name: str) -> str:
    """A block as an axis has room for it: `up 0`, `mid`, `12`, `single 3`."""
    for pattern, text in _SHORT:
        name = re.sub(pattern, text, name)
    return name


def _draw_shares(axis: Axes, blocks: Sequence[Row], num_controls: int) -> None:
    places, bottom = np.arange(len(blocks)), np.zeros(len(blocks))
    for part, color, label in (
        ("channel", BLUE, "channels"), ("place", VERMILION, "places"), ("rest", _REST, "neither"),
    ):  # fmt: skip
        heights = np.nan_to_num([row["shares"][part] for row in blocks])
        axis.bar(places, heights, 0.8, bottom, color=color, label=label)
        bottom += heights
    for place, row in enumerate(blocks):
        if np.isnan(row["shares"]["rest"]):
            text = "one place" if row["size"] > 0 else "unchanged"
            axis.text(place, 0.03, text, rotation=90, ha="center", fontsize=7, color=LINE)
    explained = np.array([row["explained"]["channel_map"] for row in blocks])
    size = 4 if len(blocks) <= 30 else 2.5
    axis.plot(
        places, np.maximum(explained, _LOWEST), color=BLACK, marker="o", linewidth=1,
        markersize=size, markeredgewidth=0.6, markeredgecolor="white",
        label="R² of a channel-wise map W F, other draws",
    )  # fmt: skip
    handles, labels = axis.get_legend_handles_labels()
    if num_controls:
        _draw_controls(axis, blocks, num_controls, size)
    axis.set_ylim(-0.08 if axis.dataLim.ymin < 0 else 0.0, 1.0)
    axis.set_ylabel("share of the change")
    axis.set_title(
        "Where the change lies (components of its variance)", fontsize=9.5,
        pad=36 if num_controls else 24,
    )  # fmt: skip
    _legend(axis, [*handles[1:], handles[0]], [*labels[1:], labels[0]], ncols=4)
    _name_blocks(axis, blocks)


def _legend(axis: Axes, handles: Sequence[Any], labels: Sequence[str], **options: Any) -> Any:
    """In a line between axis and title."""
    options = {"bbox_to_anchor": (-0.02, 1.0), "handlelength": 1.3, **options}
    return axis.legend(
        handles, labels, loc="lower left", frameon=False, fontsize=7.5, columnspacing=1.0,
        borderaxespad=0.1, **options,
    )  # fmt: skip


def _draw_controls(axis: Axes, blocks: Sequence[Row], num_controls: int, size: float) -> None:
    """The controls' mean share in channels across each bar, and their R^2, with a legend above."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    shares, explained = (
        np.array([row["controls"][what][key] for row in blocks], dtype=float)
        for what, key in (("shares", "channel"), ("explained", "channel_map"))
    )
    places = np.arange(len(blocks))
    outlined = [withStroke(linewidth=2.8, foreground="white")]
    axis.hlines(
        shares, places - 0.4, places + 0.4, color=BLACK, linewidth=1.3, path_effects=outlined
    )
    dots = axis.plot(
        places, np.maximum(explained, _LOWEST), "o", color="white", markersize=size + 0.5,
        markeredgecolor=BLACK, markeredgewidth=0.9,
    )  # fmt: skip
    tick = Line2D([], [], color=BLACK, linewidth=1.3)
    label = f"random weight changes of the same size (mean of {num_controls}): channels, R²"
    handlers = {tuple: HandlerTuple(ndivide=None)}
    axis.add_artist(
        _legend(
            axis, [(tick, *dots)], [label], bbox_to_anchor=(-0.02, 1.06), handlelength=2.4,
            handler_map=handlers,
        )
    )  # fmt: skip


def _draw_differences(axis: Axes, blocks: Sequence[Row], pad: int) -> None:
    """5 to 95 %, quartiles and median of the C and P differences of each block."""
    wide = min(5.0, 120 / len(blocks))
    for index, (part, color, label) in enumerate(
        (("channel", BLUE, "channel activations (mean over places)"),
         ("place", VERMILION, "spatial activations (mean over channels)"))
    ):  # fmt: skip
        places = np.arange(len(blocks)) + 0.4 * index - 0.2
        spans = np.array([row["difference"][part]["quantiles"][1:-1] for row in blocks]).T
        axis.vlines(places, spans[0], spans[4], color=color, linewidth=0.3 * wide)
        axis.vlines(places, spans[1], spans[3], color=color, linewidth=wide, label=label)
        axis.plot(
            places, spans[2], "o", color="white", markersize=0.6 * wide, markeredgecolor=color,
            markeredgewidth=0.2 * wide,
        )  # fmt: skip
    axis.axhline(0, color=LINE, linewidth=0.8, zorder=0)
    axis.set_ylabel("expert minus base (sd of the base)")
    axis.set_title("Differences, mean over draws: median, 50 %, 90 %", fontsize=9.5, pad=pad)
    _legend(axis, *axis.get_legend_handles_labels(), ncols=2)
    _name_blocks(axis, blocks)


def _name_blocks(axis: Axes, blocks: Sequence[Row], room: int = _ROOM) -> None:
    """Name as many blocks as there is room for, turned where they are long."""
    open_axis(axis)
    every = -(-len(blocks) * 4 // room)
    names = [short_name(row["name"]) for row in blocks]
    chosen = list(range(0, len(blocks), every))
    turned = max(len(names[i]) for i in chosen) * len(chosen) > room
    axis.set_xticks(
        chosen, [names[i] for i in chosen], fontsize=8,
        rotation=45 if turned else 0, ha="right" if turned else "center",
    )  # fmt: skip
    axis.set_xlim(-0.6, len(blocks) - 0.4)
    axis.set_xlabel("block, in the network's order")


def _draw_block(figure: SubFigure, maps: Row, row: Row, projected: Sequence[Row]) -> None:
    figure.suptitle(
        f"After {shorten(row['name'], 40)}: {row['channels']} channels, {row['grid'][0]} x "
        f"{row['grid'][1]} places, change {row['size']:.2g} sd; activations are means over draws",
        fontsize=9.5, fontweight="bold",
    )  # fmt: skip
    grid = figure.add_gridspec(
        2, 5 if projected else 4, width_ratios=[1.6, 1, 1, 1, 1.4][: 5 if projected else 4]
    )
    _draw_channels([figure.add_subplot(grid[place, 0]) for place in (0, 1)], maps)
    _draw_places(figure, [figure.add_subplot(grid[:, column]) for column in (1, 2, 3)], maps)
    if projected:
        _draw_projections(figure.add_subplot(grid[:, 4]), projected)


def _draw_channels(axes: Sequence[Axes], maps: Row) -> None:
    before, change = maps["channel_base"], maps["channel_change"]
    edges = np.arange(len(before) + 1) - 0.5
    upper, lower = axes
    upper.stairs(before, edges, color=_REST, fill=True, label="base")
    wide = 1.3 if len(before) <= 64 else 0.5
    upper.stairs(before + change, edges, color=BLUE, baseline=None, linewidth=wide, label="expert")
    upper.legend(
        frameon=False, fontsize=7.5, ncols=2, loc="lower right", bbox_to_anchor=(1.02, 1.0),
        columnspacing=1.0, handlelength=1.0, borderaxespad=0.1,
    )  # fmt: skip
    upper.set_title("Channel activations", fontsize=9, loc="left")
    lower.stairs(change, edges, color=BLUE, fill=True)
    lower.axhline(0, color=LINE, linewidth=0.8)
    lower.set_title("Their difference", fontsize=9, loc="left")
    lower.set_xlabel("channel")
    for axis in axes:
        axis.set_xlim(edges[0], edges[-1])
        axis.set_ylabel("activation")
        axis.margins(y=0.12)
        open_axis(axis)
        axis.locator_params(axis="x", integer=True, nbins=8)


def _draw_places(figure: SubFigure, axes: Sequence[Axes], maps: Row) -> None:
    """Base and expert on one scale, the difference on its own, centred at 0."""
    from matplotlib.ticker import MaxNLocator

    grid = maps["grid"]
    before, change = (maps[f"place_{what}"].reshape(grid) for what in ("base", "change"))
    ends = (min(before.min(), (before + change).min()), max(before.max(), (before + change).max()))
    limit = max(float(np.abs(change).max()), 1e-12)
    for axis, image, name, colors, (low, high) in zip(
        axes, (before, before + change, change), ("base", "expert", "difference"),
        (SEQUENTIAL, SEQUENTIAL, DIVERGING), (ends, ends, (-limit, limit)), strict=True,
    ):  # fmt: skip
        shown = axis.imshow(
            image, cmap=colors, vmin=low, vmax=high, interpolation="nearest",
            aspect="auto" if grid[0] == 1 < grid[1] else "equal",
        )  # fmt: skip
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"Spatial activations:\n{name}", fontsize=9)
        beneath = axis.inset_axes((0.05, -0.11, 0.9, 0.05))
        bar = figure.colorbar(shown, cax=beneath, orientation="horizontal")
        bar.ax.tick_params(labelsize=7.5)
        bar.locator = MaxNLocator(3)
        bar.update_ticks()
        bar.outline.set_visible(False)


def _draw_projections(axis: Axes, blocks: Sequence[Row]) -> None:
    places = np.arange(len(blocks))
    for offset, name, color, label in (
        (-0.2, "relative", "0.35", "|W - I| / |I| (Frobenius)"),
        (0.2, "largest", "0.7", "largest singular value of W - I"),
    ):
        heights = [row["projection"][name] for row in blocks]
        axis.bar(places + offset, heights, 0.4, color=color, label=label)
    axis.set_title("Projections: distance from the identity", fontsize=9)
    axis.set_ylim(top=1.8 * axis.get_ylim()[1])
    axis.legend(edgecolor="none", framealpha=0.85, fontsize=7.5, loc="upper left")
    _name_blocks(axis, blocks, room=_ROOM // 2)
