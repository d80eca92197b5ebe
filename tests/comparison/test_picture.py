from __future__ import annotations

from pathlib import Path

import matplotlib.text
import numpy as np
import pytest
from PIL import Image

from deme_cli.comparison.figures import Column, Comparison, Result, RowResult, cell_of
from deme_cli.comparison.picture import KINDS, _figure, draw_comparison, limits

COLUMNS = tuple(Column("fid", f"protocol {index}", index % 2 == 0) for index in range(4))
PROTOCOL = ("every row that trains has the same updates and images " * 4, "ddim 50 steps")


def row(name: str, kind: str, *, seeds: int = 3, level: float = 9.0, **known) -> RowResult:
    draws = np.random.default_rng(len(name))
    results = tuple(
        Result(
            None if kind == "base" else seed,
            {column: tuple((level + draws.normal(0, 1, 2)).tolist()) for column in COLUMNS},
        )
        for seed in range(seeds)
    )
    return RowResult(name, kind, 1, {}, results, **known)


def comparison(num_columns: int) -> Comparison:
    rows = (
        row("the base, as it was downloaded", "base", seeds=1),
        row("finetuned on all timesteps for as many updates as all experts", "finetune"),
        row("broken", "finetune", seeds=0, failures=("lost",)),
        row("later", "finetune", seeds=0, pending=3),
        row("one seed of $3", "ensemble", seeds=1, pending=2),
        row("merged", "merged"),
    )
    return Comparison("methods at $5 and $6", COLUMNS[:num_columns], rows, PROTOCOL)


def texts_of(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.mark.parametrize("num_columns", [0, 1, 4])
def test_any_number_of_columns_makes_a_readable_picture(num_columns: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    draw_comparison(comparison(num_columns), path)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert 900 < image.width < 3000
        assert 400 < image.height < 3000
        assert len(set(image.convert("L").resize((200, 200)).tobytes())) > 20


def test_an_svg_is_written_for_its_suffix_and_is_the_same_twice(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw_comparison(comparison(1), tmp_path / name)
    first = (tmp_path / "a.svg").read_bytes()
    assert b"<svg" in first
    assert first == (tmp_path / "b.svg").read_bytes()


def test_failed_and_pending_rows_say_so_and_hide_no_other() -> None:
    figure = _figure(comparison(2))
    texts = texts_of(figure)
    assert texts.count("failed") == texts.count("not run yet") == 2
    assert any("(partial)" in text for text in texts)
    for axis in figure.axes[:2]:
        heights = {round(float(line.get_ydata()[0])) for line in axis.lines[1:]}
        assert heights == {0, 1, 4, 5}
        bottom, top = axis.get_ylim()
        assert top < 0 < 5 < bottom  # the first row on top, the last one inside


def test_an_axis_says_which_direction_is_better() -> None:
    labels = [axis.get_xlabel() for axis in _figure(comparison(2)).axes]
    assert labels == ["protocol 0 fid (lower is better)", "protocol 1 fid (higher is better)"]


@pytest.mark.parametrize("num_columns", [1, 4])
def test_no_text_is_cut_off_or_lies_on_another(num_columns: int) -> None:
    figure = _figure(comparison(num_columns))
    figure.canvas.draw()
    whole = figure.bbox
    foot = next(text for text in figure.texts if "ddim 50 steps" in text.get_text())
    outer = [text.get_window_extent() for text in figure.texts]
    outer.append(figure.legends[0].get_window_extent())
    names = [label for axis in figure.axes for label in axis.get_yticklabels()]
    for box in [*outer, *(label.get_window_extent() for label in names if label.get_visible())]:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= whole.x1
        assert box.y1 <= whole.y1
    panels = [axis.get_tightbbox() for axis in figure.axes]
    assert not any(box.overlaps(panel) for box in outer for panel in panels)
    assert not outer[0].overlaps(outer[-1])
    assert foot.get_window_extent().y1 < min(panel.y0 for panel in panels)


def test_kinds_differ_in_marker_and_colour() -> None:
    assert len({marker for marker, _, _ in KINDS.values()}) == len(KINDS)
    assert len({color for _, color, _ in KINDS.values()}) == len(KINDS)


def test_every_dot_is_inside_the_axis_and_a_long_interval_is_not() -> None:
    rows = [row("a", "finetune", seeds=2, level=9.0), row("bb", "merged", seeds=2, level=9.5)]
    cells = [cell_of(one, COLUMNS[0], rows[0]) for one in rows]
    low, high, is_log = limits(cells)
    dots = [value for cell in cells for value in cell.seed_means]
    assert low < min(dots) < max(dots) < high
    assert high - low < 2.5 * (max(dots) - min(dots))
    assert not is_log


def test_a_row_that_is_far_off_makes_the_axis_logarithmic() -> None:
    rows = [row("a", "finetune", level=9.0), row("b", "finetune", level=900.0)]
    low, high, is_log = limits([cell_of(one, COLUMNS[0], rows[0]) for one in rows])
    assert is_log
    assert 0 < low < 9 < 900 < high


def test_one_dot_or_none_still_has_an_axis() -> None:
    one = row("a", "base", seeds=1)
    low, high, _ = limits([cell_of(one, COLUMNS[0], one)])
    assert low < cell_of(one, COLUMNS[0], one).mean < high
    assert limits([]) == (0.0, 1.0, False)
