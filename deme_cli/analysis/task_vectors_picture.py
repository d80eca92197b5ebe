"""The picture of task vectors: how far experts moved, how they agree, where they pull apart.

On top the relative norm of every tensor, a box per range (the paper's figure 6(b)), and the
effective rank of every matrix beside that of the base. Below, experts by experts, the cosines and
the shares of opposite signs. At the foot both of them by block, in the network's order. Red pulls
together, blue against. One expert alone has no pairs, and the upper row is all there is.
N experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import BLUE, LINE, VERMILION, color_of, open_axis, render, shorten
from deme_cli.analysis.task_vectors import UNRELATED, known_pairs, matrix_shape
from deme_cli.timesteps import parse_span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BASE = "0.55"
_NAME = 30  # characters
_DRAWN = ("med", "q1", "q3", "whislo", "whishi", "fliers")  # of what boxplot_stats returns


def draw_task_vectors(document: dict[str, Any], *, title: str, foot: str) -> list[bytes]:
    """The picture in each of FORMATS."""
    names = [shorten(row["name"], _NAME) for row in document["experts"]]
    pairs, blocks = document["pairs"], document["blocks"]

    def draw(figure: Figure) -> None:
        if pairs is None:
            _draw_spreads(figure, document, names)
            return
        heights = [1, 1.15, 1.2]
        upper, middle, lower = figure.subfigures(3, 1, height_ratios=heights, squeeze=False)[:, 0]
        _draw_spreads(upper, document, names)
        left, right = middle.subplots(1, 2)
        _matrix(middle, left, pairs["cosines"], names, centre=0.0, least=0.5, cmap="RdBu_r",
                label="cosine (red: alike, blue: opposed)")  # fmt: skip
        left.set_title("Cosines between experts (0 if unrelated)", fontsize=9)
        both = np.tril(pairs["sign_conflicts"], -1)
        both += np.triu(pairs["sign_conflicts_by_magnitude"], 1)
        _matrix(middle, right, both, names, centre=UNRELATED, least=0.17, cmap="RdBu",
                label="share with opposite signs (0.5 if unrelated)")  # fmt: skip
        right.set_title(
            "Sign conflict: of elements (below the diagonal), of what both moved (above)",
            fontsize=9,
        )
        _draw_blocks(lower, blocks, has_many=len(names) > 2)

    return render(draw, size=(11.5, 4.2 if pairs is None else 11.5), title=title, foot=foot)


def _draw_spreads(figure: Figure, document: dict[str, Any], names: Sequence[str]) -> None:
    """Boxes over tensors: relative norms, and effective ranks where they were measured."""
    tensors, colors = document["tensors"], [color_of(index) for index in range(len(names))]
    ranks = np.array([
        np.array([row["base_effective_rank"], *row["effective_ranks"]])
        / min(matrix_shape(tuple(row["shape"])))
        for row in tensors
    ])  # fmt: skip
    count = int(np.isfinite(ranks).any(axis=1).sum())
    axes = figure.subplots(1, 2 if count else 1, squeeze=False)[0]
    _draw_norms(axes[0], document, names, colors)
    if count:
        _boxes(axes[1], ranks, [_BASE, *colors], ["base", *names])
        axes[1].set_ylim(0, 1.03)
        axes[1].set_ylabel("effective rank / full rank")
        title = f"Effective rank of each of {count} matrices, and of the base's"
        axes[1].set_title(title, fontsize=9)


def _draw_norms(
    axis: Axes, document: dict[str, Any], names: Sequence[str], colors: Sequence[str]
) -> None:
    """A box per expert, a diamond for the whole vector, a line at T/2 where no range crosses it."""
    whole = np.array([row["relative_norm"] for row in document["experts"]])
    relative = np.array([row["relative_norms"] for row in document["tensors"]])
    _boxes(axis, relative, colors, names, log=True)
    place, moved = np.arange(len(names)), whole > 0
    axis.scatter(
        place[moved], whole[moved], marker="D", s=26, color="white", edgecolor="black", zorder=4,
        label="all tensors together",
    )  # fmt: skip
    middle = document["protocol"]["num_train_timesteps"] / 2
    spans = [parse_span(row["range"], "range") for row in document["experts"]]
    below = sum(span.stop <= middle for span in spans)
    if below + sum(span.start >= middle for span in spans) == len(spans) and 0 < below < len(spans):
        axis.axvline(below - 0.5, color=LINE, linewidth=0.9, linestyle=(0, (4, 3)),
                     label=f"t = {middle:g}")  # fmt: skip
    if moved.any():
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.13)  # room for the legend
        axis.legend(fontsize=7.5, frameon=False, loc="upper right", ncols=2, borderaxespad=0.1)
    axis.set_ylabel("|task vector| / |base weights|")
    axis.set_title("Relative norm of each tensor, by range of timesteps", fontsize=9)


def _boxes(
    axis: Axes, values: np.ndarray, colors: Sequence[str], names: Sequence[str],
    *, log: bool = False,
) -> None:  # fmt: skip
    """Of each column quartiles, whiskers to 1.5 quartile distances, dots beyond; on a log axis of
    logarithms."""
    from matplotlib.cbook import boxplot_stats

    for place, (column, color) in enumerate(zip(values.T, colors, strict=True)):
        known = column[np.isfinite(column) & ((column > 0) | (not log))]
        if not len(known):
            axis.text(place, 0.5, "none", ha="center", transform=axis.get_xaxis_transform())
            continue
        (stats,) = boxplot_stats(np.log(known) if log else known)
        if log:
            stats = {name: np.exp(stats[name]) for name in _DRAWN}
        axis.bxp(
            [stats], positions=[place], widths=0.55, patch_artist=True, manage_ticks=False,
            boxprops={"facecolor": color, "edgecolor": "0.2", "linewidth": 0.9},
            medianprops={"color": "black", "linewidth": 1.6},
            flierprops={"marker": "o", "markersize": 2.6, "markerfacecolor": color,
                        "markeredgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
    side = 0.6 if len(names) > 2 else 1.2
    axis.set_xlim(-side, len(names) - 1 + side)
    open_axis(axis)
    _tick(axis, names)
    axis.set_xlabel("expert, by its range of timesteps (0 = clean)")


def _tick(axis: Axes, names: Sequence[str]) -> None:
    """Names along x, turned where they would meet."""
    crowded = len(names) * max(map(len, names)) > 60
    axis.set_xticks(
        range(len(names)), names, rotation=30 if crowded else 0,
        ha="right" if crowded else "center", rotation_mode="anchor" if crowded else "default",
    )  # fmt: skip


def _matrix(
    figure: Figure, axis: Axes, values: np.ndarray, names: Sequence[str], *, centre: float,
    least: float, cmap: str, label: str,
) -> None:  # fmt: skip
    """Cells with their numbers, colours centred at what unrelated vectors have.

    least: how far the colours reach, so that little looks like little.
    """
    shown = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    reach = np.abs(shown - centre)
    limit = max(least, float(reach[np.isfinite(reach)].max(initial=0.0)))
    image = axis.imshow(shown, cmap=cmap, vmin=centre - limit, vmax=centre + limit, aspect="auto")
    image.set_rasterized(True)
    for (y, x), value in np.ndenumerate(shown):
        if y == x:
            continue
        text = f"{round(value, 2) + 0.0:.2f}" if np.isfinite(value) else "none"
        color = "white" if reach[y, x] > 0.65 * limit else "black"
        axis.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    _tick(axis, names)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _draw_blocks(figure: Figure, blocks: Sequence[dict[str, Any]], *, has_many: bool) -> None:
    """Cosine and sign conflict of each block: the mean over pairs, a line from least to most."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw_by_block(upper, blocks, "cosines", VERMILION, 0.0)
    upper.axhline(0, color=LINE, linewidth=0.8, linestyle=(0, (4, 3)))
    upper.set_ylabel("cosine")
    many = ": mean over pairs of experts, lines from least to most" if has_many else ""
    upper.set_title(f"By block, in the network's order{many}", fontsize=9)
    _draw_by_block(lower, blocks, "sign_conflicts", BLUE, -0.12, "of elements")
    _draw_by_block(
        lower, blocks, "sign_conflicts_by_magnitude", VERMILION, 0.12, "of what both moved"
    )
    lower.axhline(UNRELATED, color=LINE, linewidth=0.8, linestyle=(0, (4, 3)), label="unrelated")
    lower.set_ylabel("sign conflict")
    lower.legend(fontsize=7.5, frameon=False, ncols=3, loc="upper left", borderaxespad=0.1)
    low, high = lower.get_ylim()
    lower.set_ylim(low, high + 0.22 * (high - low))
    shown = [shorten(row["name"], _NAME) for row in blocks]
    turn = 90 if len(shown) > 16 else 20 if sum(map(len, shown)) > 130 else 0
    lower.set_xticks(
        range(len(shown)), shown, rotation=turn, fontsize=6.5 if turn == 90 else 8,
        ha="right" if turn == 20 else "center",
    )  # fmt: skip


def _draw_by_block(
    axis: Axes, blocks: Sequence[dict[str, Any]], name: str, color: str, shift: float,
    label: str = "",
) -> None:  # fmt: skip
    """One number of every two experts (N, N), block by block."""
    place = np.arange(len(blocks)) + shift
    known = [known_pairs(row[name]) for row in blocks]
    for x, values in zip(place, known, strict=True):
        if len(values) > 1:
            axis.plot([x, x], [values.min(), values.max()], color=color, alpha=0.45, linewidth=2)
    means = [values.mean() if len(values) else np.nan for values in known]
    axis.scatter(place, means, s=24, color=color, zorder=3, label=label or None)
    axis.set_xlim(-0.6, len(blocks) - 0.4)
    axis.margins(y=0.12)
    open_axis(axis)
