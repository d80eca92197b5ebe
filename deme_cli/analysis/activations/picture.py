"""The picture of what finetuning did to the features (the paper's figure 2, for every block).

Above, over the blocks in the network's order: which part of the variance of the change lies in
channels, in places, in neither, with what a channel-wise map explains; and the differences of
channel and spatial activations. Below, for one block: the activations of base and expert and their
differences, over channels and over places, and how far projections are from the identity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from deme_cli.analysis.activations.block_change import BlockChange
from deme_cli.analysis.activations.found import ActivationChanges
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

_REST = "0.8"
_LOWEST = -0.05  # where an R^2 below it is drawn
_ROOM = 60  # characters of names beside each other under a wide axis
_SHORT = (
    (r"^single_transformer_blocks\.", "single "),
    (r"^(transformer_)?blocks\.", ""),
    (r"_blocks?\.", " "),
    (r"_block$", ""),
)


def draw_activations(found: ActivationChanges, *, title: str, foot: str) -> list[bytes]:
    """The picture in each of figure.FORMATS."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.08], squeeze=False)[:, 0]
        left, right = upper.subplots(1, 2, width_ratios=[1.15, 1])
        _draw_shares(left, found)
        _draw_differences(right, found)
        _draw_block(lower, found)

    return render(draw, size=(12.4, 7.8), title=title, foot=foot)


def short_name(name: str) -> str:
    """A block as an axis has room for it: `up 0`, `mid`, `12`, `single 3`."""
    for pattern, text in _SHORT:
        name = re.sub(pattern, text, name)
    return name


def _draw_shares(axis: Axes, found: ActivationChanges) -> None:
    blocks = found.blocks
    places, bottom = np.arange(len(blocks)), np.zeros(len(blocks))
    for part, color, label in (
        ("channel", BLUE, "channels"), ("place", VERMILION, "places"), ("rest", _REST, "neither"),
    ):  # fmt: skip
        heights = np.nan_to_num([getattr(block.shares, part) for block in blocks])
        axis.bar(places, heights, 0.8, bottom, color=color, label=label)
        bottom += heights
    for place, block in enumerate(blocks):
        if np.isnan(block.shares.rest):
            text = "one place" if block.size > 0 else "unchanged"
            axis.text(place, 0.03, text, rotation=90, ha="center", fontsize=7, color=LINE)
    explained = np.array([block.explained.channel_map for block in blocks])
    size = 4 if len(blocks) <= 30 else 2.5
    axis.plot(
        places, np.maximum(explained, _LOWEST), color=BLACK, marker="o", linewidth=1,
        markersize=size, markeredgewidth=0.6, markeredgecolor="white",
        label="$R^2$ of a channel-wise map $W F$, other draws",
    )  # fmt: skip
    handles, labels = axis.get_legend_handles_labels()
    if found.controls:
        _draw_controls(axis, found, size)
    axis.set_ylim(-0.08 if axis.dataLim.ymin < 0 else 0.0, 1.0)
    axis.set_ylabel("share of the change")
    axis.set_title(
        "Where the change lies (components of its variance)", fontsize=9.5, pad=_title_pad(found)
    )
    axis.legend(
        [*handles[1:], handles[0]], [*labels[1:], labels[0]],
        ncols=4, loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False, fontsize=7.5,
        columnspacing=1.0, handlelength=1.3, borderaxespad=0.1,
    )  # fmt: skip
    _name_blocks(axis, blocks)


def _title_pad(found: ActivationChanges) -> float:
    """Points between axis and title: room for one line of legend, or two."""
    return 36 if found.controls else 24


def _draw_controls(axis: Axes, found: ActivationChanges, size: float) -> None:
    """The controls' mean share in channels across each bar, and their R^2, with a legend above."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    shares, explained = (
        np.array([mean[what][key] for mean in found.control_means()], dtype=float)
        for what, key in (("shares", "channel"), ("explained", "channel_map"))
    )
    places = np.arange(len(found.blocks))
    outlined = [withStroke(linewidth=2.8, foreground="white")]
    axis.hlines(
        shares, places - 0.4, places + 0.4, color=BLACK, linewidth=1.3, path_effects=outlined
    )
    drawn = axis.plot(
        places, np.maximum(explained, _LOWEST), "o", color="white", markersize=size + 0.5,
        markeredgecolor=BLACK, markeredgewidth=0.9,
    )  # fmt: skip
    tick = Line2D([], [], color=BLACK, linewidth=1.3)
    label = f"random weight changes of the same size (mean of {len(found.controls)})"
    legend = axis.legend(
        [(tick, *drawn)], [f"{label}: channels, $R^2$"], loc="lower left",
        bbox_to_anchor=(-0.02, 1.06), frameon=False, fontsize=7.5, handlelength=2.4,
        borderaxespad=0.1, handler_map={tuple: HandlerTuple(ndivide=None)},
    )  # fmt: skip
    axis.add_artist(legend)


def _draw_differences(axis: Axes, found: ActivationChanges) -> None:
    """5 to 95 %, quartiles and median of the C and P differences of each block."""
    blocks = found.blocks
    wide = min(5.0, 120 / len(blocks))
    for index, (color, label) in enumerate(
        ((BLUE, "channel activations (mean over places)"),
         (VERMILION, "spatial activations (mean over channels)"))
    ):  # fmt: skip
        places = np.arange(len(blocks)) + 0.4 * index - 0.2
        spans = np.array(
            [np.quantile(block.differences[index], (0.05, 0.25, 0.5, 0.75, 0.95))
             for block in blocks]
        ).T  # fmt: skip
        axis.vlines(places, spans[0], spans[4], color=color, linewidth=0.3 * wide)
        axis.vlines(places, spans[1], spans[3], color=color, linewidth=wide, label=label)
        axis.plot(
            places, spans[2], "o", color="white", markersize=0.6 * wide, markeredgecolor=color,
            markeredgewidth=0.2 * wide,
        )  # fmt: skip
    axis.axhline(0, color=LINE, linewidth=0.8, zorder=0)
    axis.set_ylabel("expert minus base (sd of the base)")
    axis.set_title(
        "Differences, mean over draws: median, 50 %, 90 %", fontsize=9.5, pad=_title_pad(found)
    )
    axis.legend(
        ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False, fontsize=7.5,
        columnspacing=1.0, handlelength=1.0, borderaxespad=0.1,
    )  # fmt: skip
    _name_blocks(axis, blocks)


def _name_blocks(axis: Axes, blocks: Sequence[BlockChange], room: int = _ROOM) -> None:
    """Name as many blocks as there is room for, turned where they are long."""
    open_axis(axis)
    every = -(-len(blocks) * 4 // room)
    names = [short_name(block.name) for block in blocks]
    chosen = list(range(0, len(blocks), every))
    turned = max(len(names[i]) for i in chosen) * len(chosen) > room
    axis.set_xticks(
        chosen, [names[i] for i in chosen], fontsize=8,
        rotation=45 if turned else 0, ha="right" if turned else "center",
    )  # fmt: skip
    axis.set_xlim(-0.6, len(blocks) - 0.4)
    axis.set_xlabel("block, in the network's order")


def _draw_block(figure: SubFigure, found: ActivationChanges) -> None:
    block = found.drawn
    figure.suptitle(
        f"After {shorten(block.name, 40)}: {len(block.channel_base)} channels, {block.grid[0]} x "
        f"{block.grid[1]} places, change {block.size:.2g} sd; activations are means over draws",
        fontsize=9.5, fontweight="bold",
    )  # fmt: skip
    grid = figure.add_gridspec(2, 5, width_ratios=[1.2, 1, 1, 1, 1.2])
    _draw_channels([figure.add_subplot(grid[row, 0]) for row in (0, 1)], block)
    _draw_places(figure, [figure.add_subplot(grid[:, column]) for column in (1, 2, 3)], block)
    projected = [one for one in found.blocks if one.projection]
    beside = figure.add_subplot(grid[0, 4] if projected else grid[:, 4])
    _draw_histogram(beside, block, headroom=1.8 if projected else 1.25)
    if projected:
        _draw_projections(figure.add_subplot(grid[1, 4]), projected)


def _draw_channels(axes: list[Axes], block: BlockChange) -> None:
    edges = np.arange(len(block.channel_base) + 1) - 0.5
    upper, lower = axes
    after = block.channel_base + block.channel_change
    upper.stairs(block.channel_base, edges, color=_REST, fill=True, label="base")
    wide = 1.3 if len(after) <= 64 else 0.5
    upper.stairs(after, edges, color=BLUE, baseline=None, linewidth=wide, label="expert")
    upper.legend(
        frameon=False, fontsize=7.5, ncols=2, loc="lower right", bbox_to_anchor=(1.02, 1.0),
        columnspacing=1.0, handlelength=1.0, borderaxespad=0.1,
    )  # fmt: skip
    upper.set_title("Channel activations", fontsize=9, loc="left")
    lower.stairs(block.channel_change, edges, color=BLUE, fill=True)
    lower.axhline(0, color=LINE, linewidth=0.8)
    lower.set_title("Their difference", fontsize=9, loc="left")
    lower.set_xlabel("channel")
    for axis in axes:
        axis.set_xlim(edges[0], edges[-1])
        axis.set_ylabel("activation")
        axis.margins(y=0.12)
        open_axis(axis)
        axis.locator_params(axis="x", integer=True, nbins=8)


def _draw_places(figure: SubFigure, axes: list[Axes], block: BlockChange) -> None:
    """Base and expert on one scale, the difference on its own, centred at 0."""
    from matplotlib.ticker import MaxNLocator

    before = block.place_base.reshape(block.grid)
    change = block.place_change.reshape(block.grid)
    ends = (min(before.min(), (before + change).min()), max(before.max(), (before + change).max()))
    limit = max(float(np.abs(change).max()), 1e-12)
    for axis, image, name, colors, (low, high) in zip(
        axes, (before, before + change, change), ("base", "expert", "difference"),
        (SEQUENTIAL, SEQUENTIAL, DIVERGING), (ends, ends, (-limit, limit)), strict=True,
    ):  # fmt: skip
        shown = axis.imshow(
            image, cmap=colors, vmin=low, vmax=high, interpolation="nearest",
            aspect="auto" if block.grid[0] == 1 < block.grid[1] else "equal",
        )  # fmt: skip
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"Spatial activations:\n{name}", fontsize=9)
        beneath = axis.inset_axes((0.05, -0.11, 0.9, 0.05))
        bar = figure.colorbar(shown, cax=beneath, orientation="horizontal")
        bar.ax.tick_params(labelsize=7.5)
        bar.locator = MaxNLocator(3)
        bar.update_ticks()
        bar.outline.set_visible(False)


def _draw_histogram(axis: Axes, block: BlockChange, headroom: float) -> None:
    channel, place = block.differences
    values = np.concatenate([channel, place])
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high, 25) if high > low else np.array([low - 1, low + 1])
    for part, color, name in ((channel, BLUE, "channel"), (place, VERMILION, "place")):
        heights = np.histogram(part, edges)[0] / len(part)
        axis.stairs(heights, edges, color=color, fill=True, alpha=0.35)
        label = f"{len(part):,} {name}{'s' * (len(part) > 1)}, sd {part.std():.2g}"
        axis.stairs(heights, edges, color=color, linewidth=1.3, label=label)
    axis.axvline(0, color=LINE, linewidth=0.8)
    axis.set(xlabel="difference (sd of the base's features)", ylabel="share of them")
    axis.set_ylim(top=headroom * axis.get_ylim()[1])
    axis.legend(edgecolor="none", framealpha=0.85, fontsize=7.5, loc="upper left")
    axis.set_title("Distribution of the differences", fontsize=9)
    open_axis(axis)


def _draw_projections(axis: Axes, blocks: Sequence[BlockChange]) -> None:
    places = np.arange(len(blocks))
    for offset, attribute, color, label in (
        (-0.2, "relative", "0.35", "$|W - I|_F\\, /\\, |I|_F$"),
        (0.2, "largest", "0.7", "largest singular value of $W - I$"),
    ):
        heights = [getattr(block.projection, attribute) for block in blocks]
        axis.bar(places + offset, heights, 0.4, color=color, label=label)
    axis.set_title("Projections: distance from the identity", fontsize=9)
    axis.set_ylim(top=1.8 * axis.get_ylim()[1])
    axis.legend(edgecolor="none", framealpha=0.85, fontsize=7.5, loc="upper left")
    _name_blocks(axis, blocks, room=_ROOM // 2)
