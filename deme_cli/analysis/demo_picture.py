"""The picture that ends `deme demo`: what was drawn, how far from real, which ranges improved.

Three panels. Images of each model from the same starting noise; the Fréchet distance of each row
per evaluation seed, lines joining the same seed; the held-out loss of each model on each range of
timesteps, relative to the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deme_cli.analysis.figure import BLUE, DIVERGING
from deme_cli.artifacts import load_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_COLUMNS = 12  # images of each model


@dataclass(frozen=True)
class SummaryRow:
    """One model: its name, samples artifact, distances per seed, and held-out loss per range."""

    name: str
    samples: Path
    distances: tuple[float, ...]
    losses: tuple[float, ...]


def draw_summary(
    rows: Sequence[SummaryRow], ranges: Sequence[str], path: Path, *, metric: str, protocol: str
) -> None:
    """Write the PNG for `rows` (the first is the base); `protocol` is the line at its foot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.15], squeeze=False)[:, 0]
    _draw_images(upper, rows)
    left, right = lower.subplots(1, 2, width_ratios=[1.1, 1])
    _draw_distances(left, rows, metric)
    _draw_losses(right, rows, ranges)
    figure.supxlabel(protocol, fontsize=8, color="0.35")
    figure.savefig(path)


def _draw_images(figure: SubFigure, rows: Sequence[SummaryRow]) -> None:
    axes = figure.subplots(len(rows), 1)
    figure.suptitle("The same starting noise, denoised by each model", fontsize=11)
    for axis, row in zip(axes, rows, strict=True):
        images = load_tensors(row.samples)["images"][:_COLUMNS].numpy()
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
        strip = np.concatenate(list(padded), axis=1)
        axis.imshow(strip.squeeze(-1) if strip.shape[-1] == 1 else strip, cmap="gray")
        axis.set_ylabel(row.name, rotation=0, ha="right", va="center", fontsize=10)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def _draw_distances(axis: Axes, rows: Sequence[SummaryRow], metric: str) -> None:
    values = np.array([row.distances for row in rows])  # (rows, seeds)
    positions = np.arange(len(rows))
    axis.plot(positions, values, color="0.75", linewidth=1, zorder=1)
    for seed in range(values.shape[1]):
        axis.scatter(positions, values[:, seed], s=28, color=BLUE, zorder=2)
    axis.scatter(positions, values.mean(1), marker="_", s=900, color="black", zorder=3)
    for x, mean in zip(positions, values.mean(1), strict=True):
        axis.annotate(
            f"{mean:.3f}", (x, mean), (0, 9), textcoords="offset points", ha="center", fontsize=9
        )
    axis.set_xticks(positions, [row.name for row in rows])
    axis.set_xlim(-0.5, len(rows) - 0.5)
    axis.margins(y=0.15)
    axis.set_ylabel(f"{metric} (lower is better)")
    axis.set_title("Distance to real digits: a dot per seed, bar = mean", fontsize=11)
    axis.grid(axis="y", color="0.92")


def _draw_losses(axis: Axes, rows: Sequence[SummaryRow], ranges: Sequence[str]) -> None:
    losses = np.array([row.losses for row in rows])
    change = 100 * (losses / losses[0] - 1)  # per cent
    limit = max(np.abs(change).max(), 0.1)
    axis.imshow(change, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    for (y, x), value in np.ndenumerate(change):
        color = "white" if abs(value) > 0.6 * limit else "black"
        axis.text(x, y, f"{value:+.1f}", ha="center", va="center", color=color, fontsize=9)
    axis.set_xticks(range(len(ranges)), ranges)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.set_xlabel("timesteps t (0 = clean)")
    axis.set_title("Held-out loss against the base, %", fontsize=11)
