"""Curves of training: what was logged twice, torn or not finite, and axes that can be read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from deme_cli.errors import ArtifactError
from deme_cli.reporting.charts import WIDTH, Line, panel
from deme_cli.reporting.curves import read_curve, training_curves
from deme_cli.reporting.folder import open_folder


def _record(step: int, loss: float, held_out: float | None = None) -> str:
    return json.dumps(
        {"step": step, "loss": loss, "lr": 0.1, "consistency": 0, "held_out": held_out}
    )


def test_a_torn_line_is_left_out_and_a_step_counts_as_logged_last(tmp_path: Path) -> None:
    path = tmp_path / "ft_1of4.metrics.jsonl"
    lines = [
        _record(10, 1.0),
        _record(20, 5.0, 0.5),
        "",
        _record(20, 2.0, 0.25),
        "[]",
        _record(30, 3.0),
    ]
    path.write_text("\n".join(lines) + '\n{"step": 40, "lo')
    curve = read_curve(path)
    assert curve.losses == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert curve.held_out == [(20, 0.25)]
    assert curve.torn == 2
    curves = training_curves(open_folder(tmp_path))
    assert curves.remarks == ["ft_1of4: 2 lines are torn and left out"]
    assert [one.title for one in curves.panels] == ["ft_1of4, no artifact yet", "Learning rates"]


def test_a_line_breaks_where_the_loss_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "x.metrics.jsonl"
    path.write_text("\n".join(_record(i, math.nan if i == 3 else i) for i in range(1, 7)))
    curves = training_curves(open_folder(tmp_path))
    raw = curves.panels[0].plots[0].drawn[0]
    assert [len(stroke.split()) for stroke in raw.strokes] == [2, 3]
    assert curves.remarks == ["x: the loss of 1 of 6 records is not finite; the line breaks there"]


def test_a_file_without_a_record_is_noted(told_copy: Path, page_of: Callable) -> None:
    (told_copy / "again.metrics.jsonl").write_text('{"step": "x"}\n')
    with pytest.raises(ArtifactError, match="no record of training"):
        read_curve(told_copy / "again.metrics.jsonl")
    page, folder = page_of(told_copy)
    assert not page.section("training")
    assert [one.reason for one in folder.unread] == ["holds no record of training"]


def test_experts_come_in_order_of_their_ranges_before_the_control(
    finished_run: Path, tmp_path: Path
) -> None:
    for source in finished_run.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    for name in ("zz", "ft_2of4", "base", "ft_1of4"):
        (tmp_path / f"{name}.metrics.jsonl").write_text(_record(1, 1.0))
    titles = [one.title for one in training_curves(open_folder(tmp_path)).panels]
    assert titles[:3] == ["base", "ft_1of4, t in 0:25", "ft_2of4, t in 25:50"]
    assert titles[3] == "zz, no artifact yet"


@pytest.mark.parametrize("points", [
    [(1, 0.28901), (400, 0.28922)], [(5, 7.0)], [(1, 1e-8), (2, 3e-8)], [], [(1, -2e12), (9, 5e12)],
    [(1, 0.0), (2, 0.0)],
])  # fmt: skip
def test_ticks_are_told_apart_and_lines_stay_within(points: list) -> None:
    one = panel("x", "x", [("loss", [Line("mean", "#000000", points)])])
    plot = one.plots[0]
    texts = [tick.text for tick in plot.ticks]
    assert len(set(texts)) == len(texts) >= 1
    assert all(0 <= tick.place <= plot.height for tick in plot.ticks)
    for stroke in plot.drawn[0].strokes:
        for pair in stroke.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= plot.height
