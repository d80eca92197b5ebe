"""The curves of training, from the `*.metrics.jsonl` beside each artifact: one panel a run.

A line that a killed process left torn is passed over, and a step that was logged twice counts as it
was logged last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from deme_cli.analysis.figure import color_of
from deme_cli.artifacts import BaseRecord, DenoiserRecord, ExpertRecord
from deme_cli.console import plain
from deme_cli.errors import ArtifactError
from deme_cli.reporting.charts import Line, Panel, Points, panel
from deme_cli.reporting.folder import METRICS, Folder, is_whole, read_text

_POINTS = 300  # of a raw line; more are means of neighbours
_SMOOTH = 20  # parts of a run over which the thick line is a mean
_PLAIN = "#7A7A7A"


@dataclass(frozen=True)
class Curve:
    """What one run logged, in order of its updates. `torn`: lines that are no record."""

    name: str
    losses: Points
    held_out: Points
    rates: Points
    consistency: bool  # whether a part of the loss is of the consistency loss
    torn: int


@dataclass(frozen=True)
class Curves:
    """The panels, and remarks on what was passed over."""

    panels: list[Panel]
    remarks: list[str]
    has_held_out: bool
    has_consistency: bool
    num_runs: int


def read_curve(path: Path) -> Curve:
    """The curve in a metrics file. Raises ArtifactError where no line of it is a record."""
    records: dict[int, Mapping[str, Any]] = {}
    torn = 0
    for text in filter(None, read_text(path).splitlines()):
        try:
            record = json.loads(text)
            records[int(record["step"])] = record
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            torn += 1
    if not records:
        raise ArtifactError(f"{path}: holds no record of training")
    ordered = sorted(records.items())
    return Curve(
        path.name.removesuffix(METRICS),
        [(step, _number(record.get("loss"))) for step, record in ordered],
        [
            (step, _number(record["held_out"]))
            for step, record in ordered
            if record.get("held_out") is not None
        ],
        [(step, _number(record.get("lr"))) for step, record in ordered],
        any(_number(record.get("consistency")) > 0 for _, record in ordered),
        torn,
    )


def _number(value: Any) -> float:
    """A number, or nan for whatever else stands in its place."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else math.nan


def training_curves(folder: Folder) -> Curves | None:
    """A panel per run, experts in order of their ranges, then the learning rates of all."""
    curves, remarks = [], []
    for path in folder.metrics:
        try:
            curve = read_curve(path)
        except (ArtifactError, OSError) as error:
            folder.give_up(path.name, error)
            continue
        curves.append(curve)
        remarks += _remarks(curve)
    if not curves:
        return None
    owners = {artifact.stem: record for artifact, record in folder.of(BaseRecord, ExpertRecord)}
    curves.sort(key=lambda curve: _order(curve.name, owners.get(curve.name)))
    colors = _colors(curves, owners)
    panels = [_panel(curve, owners.get(curve.name), colors[curve.name]) for curve in curves]
    rates = [Line("rate", colors[curve.name], curve.rates) for curve in curves]
    if any(math.isfinite(rate) for line in rates for _, rate in line.points):
        summary = f"The learning rate of {len(rates)} runs against the update."
        panels.append(panel("Learning rates", summary, [("rate", rates)], from_zero=True))
    return Curves(
        panels, remarks, any(curve.held_out for curve in curves),
        any(curve.consistency for curve in curves), len(curves),
    )  # fmt: skip


def _order(name: str, owner: DenoiserRecord | None) -> tuple[int, int, int, str]:
    """Base, experts by the width of their family and then their range, then the others."""
    if isinstance(owner, BaseRecord):
        return 0, 0, 0, name
    if isinstance(owner, ExpertRecord):
        return 2 if is_whole(owner) else 1, -(owner.of or 0), owner.range[0], name
    return 3, 0, 0, name


def _colors(curves: Sequence[Curve], owners: Mapping[str, DenoiserRecord]) -> dict[str, str]:
    """Experts in the colours of the figures, by their ranges; all others grey."""
    colors, index = {}, 0
    for curve in curves:
        is_part = _order(curve.name, owners.get(curve.name))[0] == 1
        colors[curve.name] = color_of(index) if is_part else _PLAIN
        index += is_part
    return colors


def _panel(curve: Curve, owner: DenoiserRecord | None, color: str) -> Panel:
    lines = [Line("raw", color, _means(curve.losses, _POINTS))]
    if len(curve.losses) >= 2 * _SMOOTH:
        lines.append(Line("mean", color, _means(curve.losses, _SMOOTH)))
    plots = [("loss", lines)]
    if curve.held_out:
        plots.append(("held-out", [Line("held-out", color, curve.held_out)]))
    title = curve.name
    if owner is None:
        title += ", no artifact yet"
    elif isinstance(owner, ExpertRecord):
        title += f", t in {owner.timesteps}"
    first, last = curve.losses[0], curve.losses[-1]
    summary = (
        f"{curve.name}: training loss {plain(first[1])} at update {first[0]:,}, "
        f"{plain(last[1])} at update {last[0]:,}"
    )
    if curve.held_out:
        step, value = curve.held_out[-1]
        summary += f"; held-out loss {plain(value)} at update {step:,}"
    return panel(title, f"{summary}.", plots)


def _means(points: Points, count: int) -> Points:
    """At most `count` points, each the mean of as many neighbours; nan where one is not finite."""
    if len(points) <= count:
        return points
    edges = [len(points) * i // count for i in range(count + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _remarks(curve: Curve) -> list[str]:
    broken = sum(not math.isfinite(loss) for _, loss in curve.losses)
    remarks = []
    if curve.torn:
        lines = "one line is" if curve.torn == 1 else f"{curve.torn} lines are"
        remarks.append(f"{curve.name}: {lines} torn and left out")
    if broken:
        remarks.append(f"{curve.name}: the loss of {broken} of {len(curve.losses)} records is "
                       f"not finite; the line breaks there")  # fmt: skip
    return remarks
