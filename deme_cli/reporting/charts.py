"""Small line charts as the numbers of an SVG, which the page draws in its own type and colours.

Places are in user units from the top left corner of a plot, WIDTH wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from deme_cli.console import MINUS, fixed

WIDTH = 240.0
TALL, LOW = 110.0, 46.0  # heights of a panel's first plot and of the one below it
_GAP = 16.0  # between two plots
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """Points to be joined wherever neighbours are finite. role: raw, mean, held-out or rate."""

    role: str
    color: str
    points: Points


@dataclass(frozen=True)
class Tick:
    place: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A line in user units: its strokes as SVG `points`, and single dots."""

    line: Line
    strokes: list[str]
    dots: list[tuple[str, str]]


@dataclass(frozen=True)
class Plot:
    """One plot of a panel, `height` high, its top at `top`."""

    label: str
    top: float
    height: float
    ticks: list[Tick]
    drawn: list[Drawn]


@dataclass(frozen=True)
class Panel:
    """A small chart of one plot or of two over the same axis. `summary` says it in words."""

    title: str
    summary: str
    ticks: list[Tick]
    plots: list[Plot]

    @property
    def height(self) -> float:
        """From the top to the axis."""
        return self.plots[-1].top + self.plots[-1].height


def panel(
    title: str,
    summary: str,
    plots: Sequence[tuple[str, Sequence[Line]]],
    *,
    from_zero: bool = False,
) -> Panel:
    """Lay out plots, each a label and its lines, over one axis.

    Of a noisy line the outermost hundredths may leave the plot.
    """
    lines = [line for _, some in plots for line in some]
    xs = [x for line in lines for x, y in line.points if math.isfinite(y)]
    x_axis = _Axis(min(xs, default=0.0), max(xs, default=1.0), WIDTH)
    laid, top = [], 0.0
    for index, (label, some) in enumerate(plots):
        ys = [y for line in some for y in _limits(line)] + [0.0] * from_zero
        height = LOW if index else TALL if len(plots) > 1 else TALL + LOW + _GAP
        y_axis = _Axis(min(ys, default=0.0), max(ys, default=1.0), height, is_upward=True)
        drawn = [Drawn(line, *_strokes(line, x_axis, y_axis)) for line in some]
        laid.append(Plot(label, top, height, y_axis.ticks(2 if index else 4), drawn))
        top += height + _GAP
    return Panel(title, summary, x_axis.ticks(4), laid)


def _limits(line: Line) -> list[float]:
    """The values that must be seen: all of a line, of a noisy one the middle 98 %."""
    ys = sorted(y for _, y in line.points if math.isfinite(y))
    cut = len(ys) // 100 if line.role == "raw" else 0
    return ys[cut : len(ys) - cut]


class _Axis:
    """Values to user units from 0 to `size`: rightwards, or upwards with some room at the ends."""

    def __init__(self, low: float, high: float, size: float, *, is_upward: bool = False) -> None:
        room = (high - low) * 0.06 if is_upward else 0.0
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            room = abs(low) * 0.1 or 1.0
        self.low, self.high, self.size, self.is_upward = low - room, high + room, size, is_upward

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return (1 - share if self.is_upward else share) * self.size

    def ticks(self, count: int) -> list[Tick]:
        from matplotlib.ticker import MaxNLocator

        values = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        inside = [float(v) for v in values if self.low <= v <= self.high]
        gap = min((b - a for a, b in pairwise(inside)), default=0.0)
        return [Tick(round(self.place(v), 2), _tick_text(v, gap)) for v in inside]


def _tick_text(value: float, gap: float) -> str:
    """With the digits that tell it from its neighbours, and no more."""
    if abs(value) < gap * 1e-6:
        return "0"
    place = math.floor(math.log10(gap or abs(value) / 100) + 1e-9)
    leading = gap / 10**place
    place -= abs(leading - round(leading)) > 1e-6  # a step of 2.5
    if place < -6:
        digits = max(0, math.floor(math.log10(abs(value))) - place)
        return f"{value:.{digits}e}".replace("e-0", "e-").replace("-", MINUS)
    return fixed(value, max(0, -place))


def _strokes(line: Line, x_axis: _Axis, y_axis: _Axis) -> tuple[list[str], list[tuple[str, str]]]:
    """Runs of finite points; a run of one is a dot, and held-out losses are dots as well."""
    runs = list(_runs([(x_axis.place(x), y_axis.place(y)) for x, y in line.points]))
    written = [[(f"{x:.1f}", f"{y:.1f}") for x, y in run] for run in runs]
    strokes = [" ".join(f"{x},{y}" for x, y in run) for run in written if len(run) > 1]
    dots = [one for run in written for one in run if len(run) == 1 or line.role == "held-out"]
    return strokes, dots


def _runs(points: Points) -> Iterator[list[tuple[float, float]]]:
    run: list[tuple[float, float]] = []
    for point in points:
        if all(map(math.isfinite, point)):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run
