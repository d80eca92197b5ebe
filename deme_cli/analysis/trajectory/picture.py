"""The picture of trajectories: the x_0 that each step predicts, and how far the ways part.

A row per model, from noise on the left to the image on the right, which is set apart. Under the
ensemble's row lies a bar in the colour of the expert that acts; under an expert's, which denoises
all of [0, T) here, it covers the steps that it was finetuned for. Beneath, on the same t, the
distances to the base and to the ensemble.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from deme_cli.analysis import figure as style
from deme_cli.analysis.trajectory.found import Trajectories, Trajectory, standard_error
from deme_cli.evaluation.row_plans import ENSEMBLE
from deme_cli.timesteps import TimestepRange, route

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_GAP, _BAR, _APART = 0.06, 0.13, 0.35  # in widths of a picture: between two, of a bar, the image
_WIDTH, _LARGEST = 9.0, 0.85  # inches of the strip and of a picture, at most
# So that the PNG stays below 2 MB even of noise: pixels of all pictures together, in the file, and
# of their own where each is shown as a square, at most so many a side.
_PIXELS, _SQUARES, _MOST_SQUARES = 0.4e6, 0.25e6, 64
_DPI = 160
_LEAST_SIDE = 96  # pixels of a picture in the sheet
_HEAD = 0.3  # inches of a timestep over a picture
_NAME = 36  # characters of a name, at most
_CURVES = 2.7  # inches
_KINDS = {"base": style.BASE, ENSEMBLE: style.ENSEMBLE, "merged": style.MERGED}
_DASHES = ("-", "--", ":", "-.")


def draw_trajectories(found: Trajectories, *, foot: str) -> list[bytes]:
    """The picture in each of the formats. foot: how it was drawn."""
    cell = _cell(found)
    tops, bottom = _tops(found)
    labels = [_label(one) for one in found.trajectories]
    longest = max(map(len, labels))
    width = max(8.0, _across(found) * cell + 0.085 * longest + 0.9)
    lines = math.ceil(len(labels) / max(1, int(width / (0.057 * longest + 0.75))))  # of the legend
    heights = [bottom * cell + 0.75]
    if found.references:
        heights += [_CURVES, 0.22 * lines + 0.1]

    def draw(figure: Figure) -> None:
        across = max(1, len(found.references))
        grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
        _draw_strip(figure.add_subplot(grid[0, :]), found, tops, bottom)
        drawn: dict[str, Line2D] = {}
        for place, reference in enumerate(found.references):
            drawn |= _draw_distances(figure.add_subplot(grid[1, place]), found, reference)
        if drawn:
            axis = figure.add_subplot(grid[2, :])
            axis.axis("off")
            handles = [drawn[one.name] for one in found.trajectories if one.name in drawn]
            columns = math.ceil(len(handles) / lines)
            axis.legend(handles=handles, loc="center", ncols=columns, frameon=False, fontsize=8)

    who = f"The same noise, denoised by {len(labels)} models" if labels[1:] else labels[0]
    title, size = f"{who}: the $x_0$ that each step predicts", (width, sum(heights) + 0.75)
    return style.render(draw, size=size, title=title, foot=foot)


def _cell(found: Trajectories) -> float:
    """Inches of a picture's width: as wide as there is room for, unless that is too many pixels.

    Pixels that are shown as squares (`_has_squares`) take no more of the file the larger they are.
    """
    cell = min(_LARGEST, _WIDTH / _across(found))
    if _has_squares(found):
        return cell
    return min(cell, math.sqrt(_PIXELS / _count(found) / _height(found)) / _DPI)


def _count(found: Trajectories) -> int:
    """Pictures of all models."""
    return sum(math.prod(one.pictures.shape[:2]) for one in found.trajectories)


def _has_squares(found: Trajectories) -> bool:
    """Whether pictures are small and few enough that each of their pixels is shown as a square."""
    height, side = found.trajectories[0].pictures.shape[2:4]
    return side <= _MOST_SQUARES and _count(found) * height * side <= _SQUARES


def _across(found: Trajectories) -> float:
    """Widths of a picture that the strip takes."""
    return len(found.columns) * (1 + _GAP) + _APART + 1


def _tops(found: Trajectories) -> tuple[np.ndarray, float]:
    """Where each picture's row begins, (rows, models), and where the last one ends."""
    num_rows = len(found.trajectories[0].pictures)
    tops, y = np.zeros((num_rows, len(found.trajectories))), 0.0
    for row in range(num_rows):
        y += 0.4 if row else 0.0
        for place, one in enumerate(found.trajectories):
            tops[row, place] = y
            y += _height(found) + (_BAR + 2 * _GAP if _has_bar(one) else _GAP)
    return tops, y


def _has_bar(one: Trajectory) -> bool:
    return one.kind == ENSEMBLE or one.span is not None


def _draw_strip(axis: Axes, found: Trajectories, tops: np.ndarray, bottom: float) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    lefts = [place * (1 + _GAP) for place in range(len(found.columns))]
    lefts.append(lefts[-1] + 1 + _APART)
    height = _height(found)
    sheet = _sheet(found, tops, lefts, bottom)
    axis.imshow(
        sheet, extent=(0, lefts[-1] + 1, bottom, 0), aspect="equal",
        interpolation="nearest" if _has_squares(found) else "auto",
    )  # fmt: skip
    frames = [Rectangle((left, top), 1, height) for top in tops.ravel() for left in lefts]
    axis.add_collection(PatchCollection(frames, facecolor="none", edgecolor="0.75", linewidth=0.5))
    for (_, place), top in np.ndenumerate(tops):
        if _has_bar(found.trajectories[place]):
            _draw_bar(axis, found, found.trajectories[place], lefts, top + height + _GAP / 2)
    every = math.ceil(_HEAD / _cell(found) / (1 + _GAP))
    heads = [
        "" if place % every or place > len(lefts) - 1 - every else f"{found.times[column]:.0f}"
        for place, column in enumerate(found.columns)
    ]
    axis.set_xticks([left + 0.5 for left in lefts], [*heads, "image"], fontsize=8)
    axis.xaxis.tick_top()
    axis.annotate(
        "t =", (0, 1), (-6, 5), xycoords="axes fraction", textcoords="offset points",
        ha="right", fontsize=8,
    )  # fmt: skip
    names = [style.shorten(one.name, _NAME) for one in found.trajectories] * len(tops)
    axis.set_yticks(tops.ravel() + height / 2, names, fontsize=min(9, 65 * height * _cell(found)))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlim=(-_GAP, lefts[-1] + 1 + _GAP), ylim=(bottom, -_GAP))
    for row, places in enumerate(tops if len(tops) > 1 else []):
        axis.text(
            lefts[-1] + 1.15, places.mean(), f"image {row}", rotation=90, va="center", fontsize=8
        )


def _height(found: Trajectories) -> float:
    """Of a picture, in its widths."""
    return found.trajectories[0].pictures.shape[2] / found.trajectories[0].pictures.shape[3]


def _sheet(found: Trajectories, tops: np.ndarray, lefts: list[float], bottom: float) -> np.ndarray:
    """All pictures on white, small ones with each pixel as a square.  uint8 (H, W, 3)

    One image, for matplotlib takes its time over each. Large ones are reduced to about twice what
    is shown of them.
    """
    side = found.trajectories[0].pictures.shape[3]
    factor = max(1, int(side / (2 * _DPI * _cell(found))))
    times = math.ceil(_LEAST_SIDE / side) if factor == 1 else 1
    unit = -(-side // factor) * times  # sheet pixels per width of a picture
    size = math.ceil(bottom * unit), math.ceil((lefts[-1] + 1) * unit), 3
    sheet = np.full(size, 255, np.uint8)
    for (row, place), top in np.ndenumerate(tops):
        for left, picture in zip(lefts, found.trajectories[place].pictures[row], strict=True):
            colors = picture[:, :, :3] if picture.shape[2] >= 3 else picture[:, :, [0, 0, 0]]
            colors = np.asarray(Image.fromarray(np.ascontiguousarray(colors)).reduce(factor))
            large = colors.repeat(times, axis=0).repeat(times, axis=1)
            y, x = round(top * unit), round(left * unit)
            sheet[y : y + len(large), x : x + unit] = large
    return sheet


def _draw_bar(
    axis: Axes, found: Trajectories, one: Trajectory, lefts: list[float], top: float
) -> None:
    """Who acts, over the steps from each picture to the next."""
    edges = [*found.columns, len(found.times)]
    spans = _spans(found)
    for left, first, stop in zip(lefts, edges, edges[1:], strict=False):
        for step in range(first, stop):
            expert = one.acted[step]
            if one.kind != ENSEMBLE:
                expert = route(found.times[step], spans)
                if spans[expert] != one.span:
                    continue
            share = (1 + _GAP * (left != lefts[-2])) / (stop - first)
            _draw_block(axis, left + (step - first) * share, top, share, _order(found, one, expert))


def _draw_block(axis: Axes, left: float, top: float, width: float, order: int) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((left, top), width, _BAR, **_filled(order)))


def _filled(order: int) -> dict[str, Any]:
    """The look of an expert's block; where colours begin anew, hatched."""
    hatch = "////" if order >= len(style.EXPERTS) else None
    return {
        "facecolor": style.color_of(order), "edgecolor": "white", "linewidth": 0, "hatch": hatch,
    }  # fmt: skip


def _spans(found: Trajectories) -> list[TimestepRange]:
    """The ranges of all experts here, in order."""
    own = [one.span for one in found.trajectories if one.span is not None]
    return sorted(set(own))


def _order(found: Trajectories, one: Trajectory, expert: int) -> int:
    """The place among all ranges of one that acts in an ensemble, or of an expert's own."""
    spans = _spans(found)
    own = one.experts[expert][0] if one.kind == ENSEMBLE else spans[expert]
    return spans.index(own) if own in spans else expert


def _label(one: Trajectory) -> str:
    name = style.shorten(one.name, _NAME)
    return f"{name} ({one.span})" if one.span is not None else name


def _draw_distances(axis: Axes, found: Trajectories, reference: str) -> dict[str, Line2D]:
    """How far all others are from one, step by step; returns their lines by name."""
    lines: dict[str, Line2D] = {}
    others = [one for one in found.trajectories if one.name != reference]
    for one in others:
        values, look = one.distances[reference].steps, _look(found, one)
        means, error = values.mean(axis=1), standard_error(values)
        if one.span is None:  # those of experts would lie over each other
            axis.fill_between(
                found.times, means - error, means + error, color=look["color"], alpha=0.15,
                linewidth=0,
            )  # fmt: skip
        lines |= {
            one.name: axis.plot(
                found.times, means, label=_label(one), marker="o", markersize=2.2,
                **look,
            )[0]
        }  # fmt: skip
    style.open_axis(axis)
    for order, span in enumerate(_spans(found)):
        axis.axvline(span.start, color="0.85", linewidth=0.8, zorder=0)
        axis.axvspan(span.start, span.stop, ymin=0.965, **_filled(order))
    axis.set(
        xlim=(found.num_train_timesteps, 0),
        ylim=(0, None),
        xlabel="timestep t (from noise to image)",
    )
    axis.set_ylabel(f"RMS of $x_0$ ({found.unit})")
    axis.set_title(f"Distance from {style.shorten(reference, _NAME)}", fontsize=9)
    return lines


def _look(found: Trajectories, one: Trajectory) -> dict[str, Any]:
    """How a model's line is drawn; of those in one colour, each in its own dashes."""
    if one.span is None:
        color, width = _KINDS.get(one.kind, style.OTHER), 1.8
        alike = [o.name for o in found.trajectories if o.span is None and o.kind == one.kind]
        turn = alike.index(one.name)
    else:
        order = _spans(found).index(one.span)
        color, width, turn = style.color_of(order), 1.1, order // len(style.EXPERTS)
    return {"color": color, "linewidth": width, "linestyle": _DASHES[turn % len(_DASHES)]}
