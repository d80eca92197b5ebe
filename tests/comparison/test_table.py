"""The figures of a table and what may be said of them; then its forms."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from deme_cli.comparison.plan import Published
from deme_cli.comparison.table import (
    OVER_EVALUATION,
    OVER_TRAINING,
    Column,
    Comparison,
    Result,
    Row,
    best_of,
    cell_of,
    columns_of,
    difference_of,
    document,
    draw,
    escape,
    headlines,
    markdown,
)

FID, CLIP = Column("fid"), Column("clip_score", "coco")
REASON = "runs/a|b: loss is not finite <nan>,\n see `log`"
DASH, DAGGER = "\N{EN DASH}", "\N{DAGGER}"


def row(name: str, values: Any, kind: str = "finetune", column: Column = FID, **known: Any) -> Row:
    """values: (S, R); by training seed where they are a dict; (R,) of the base."""
    by_seed = values if isinstance(values, dict) else dict(enumerate(values))
    if kind == "base":
        by_seed = {None: values}
    results = [Result(s, {column.title: list(map(float, v))}) for s, v in by_seed.items()]
    return Row(name, kind, results=results, **known)


BASE = row("base", [10.0, 11.0], kind="base")


def test_a_cell_averages_repeats_first_and_its_sd_is_over_training_seeds() -> None:
    values = np.random.default_rng(0).normal(5, 1, (4, 3))
    cell = cell_of(row("a", values), FID, BASE)
    assert cell.mean == pytest.approx(values.mean())
    assert cell.seed_means == pytest.approx(values.mean(1).tolist())
    assert cell.sd == pytest.approx(values.mean(1).std(ddof=1))
    assert cell.repeats_sd == pytest.approx(values.std(1, ddof=1).mean())
    assert cell.num_repeats == 3
    sample = values.mean(1)
    expected = stats.t.interval(0.95, 3, sample.mean(), stats.sem(sample))
    assert cell.interval == pytest.approx(expected)


def test_a_shift_that_all_rows_share_in_a_repeat_leaves_their_difference_exactly() -> None:
    draws = np.random.default_rng(2)
    ours, theirs, shift = draws.integers(0, 9, (3, 4)), draws.integers(0, 9, (3, 4)), [64, -8, 0, 2]
    plain = difference_of(row("a", ours), row("b", theirs), FID)
    assert difference_of(row("a", ours + shift), row("b", theirs + shift), FID) == plain


def test_equal_training_seeds_are_paired_and_others_left_out() -> None:
    ours = row("a", {7: [1.0], 3: [2.0], 9: [50.0]})
    theirs = row("b", {3: [1.5], 7: [0.5], 8: [-50.0]})
    difference = difference_of(ours, theirs, FID)
    assert (difference.mean, difference.sd, difference.over) == (0.5, 0.0, OVER_TRAINING)


def test_a_row_without_training_is_paired_with_every_seed() -> None:
    trained = row("a", [[8.0, 9.0], [6.0, 7.0]])
    difference = cell_of(trained, FID, BASE).difference
    assert (difference.to, difference.mean, difference.over) == ("base", -3.0, OVER_TRAINING)
    back = difference_of(BASE, trained, FID)
    assert (back.mean, back.sd) == (3.0, difference.sd)


def test_one_training_seed_gives_an_interval_over_evaluation_seeds_that_says_so() -> None:
    cell = cell_of(row("a", [[9.0, 11.5, 99.0]]), FID, BASE)  # a repeat that only one row has
    assert (cell.sd, cell.interval) == (None, None)
    assert cell.difference.over == OVER_EVALUATION
    expected = stats.t.interval(0.95, 1, -0.25, stats.sem([-1.0, 0.5]))
    assert cell.difference.interval == pytest.approx(expected)


def test_one_pair_makes_no_difference_and_no_result_makes_no_cell() -> None:
    assert cell_of(row("a", [[9.0]]), FID, row("base", [10.0], kind="base")).difference is None
    assert cell_of(row("a", {}), FID, BASE) is None
    assert cell_of(row("a", [[9.0]]), CLIP, BASE) is None
    assert cell_of(row("a", [[9.0], [8.0]]), FID, row("b", {})).difference is None
    assert cell_of(BASE, FID, BASE).difference is None


@pytest.mark.parametrize(("column", "expected"), [(FID, "low"), (CLIP, "high")])
def test_the_best_row_follows_the_direction_of_its_column(column: Column, expected: str) -> None:
    rows = [row("low", [[1.0], [1.1]], column=column), row("high", [[5.0], [5.2]], column=column)]
    best, not_beaten = best_of(rows, column)
    assert (best.name, not_beaten) == (expected, [])


def test_rows_whose_interval_includes_0_are_not_told_apart_from_the_best() -> None:
    best, near = row("best", [[1.0], [1.1], [0.9]]), row("near", [[1.2], [1.0], [1.0]])
    far, gone = row("far", [[5.0], [5.1], [4.8]]), row("gone", {}, failures=["lost"])
    lone = row("lone", {9: [4.0]})
    found = best_of([far, near, gone, lone, best], FID)
    assert found == (best, [near, lone])
    assert best_of([row("a", [[float("nan")]])], FID) is None


def test_a_row_that_lacks_seeds_is_not_called_best_until_every_row_does() -> None:
    whole, part = row("whole", [[2.0], [2.1]]), row("part", [[1.0]], pending=1)
    assert best_of([whole, part], FID)[0] is whole
    assert best_of([part], FID)[0] is part
    assert best_of([row("none", {}, pending=2)], FID) is None
    table = Comparison("a table", [FID], [whole, part], [])
    assert headlines(table)[-1] == "not all seeds are measured yet: part"


def test_the_state_of_a_row_tells_each_reason_once_and_what_is_still_to_run() -> None:
    assert BASE.state == ""
    failed = row("a", {}, failures=["no\nmemory", "no memory"], pending=1)
    assert failed.state == "failed: no memory; not run yet (1 of 3 seeds)"
    assert row("a", [[1.0]], failures=["lost"]).state == "failed for other seeds: lost"
    assert len(row("a", {}, failures=["x " * 5000]).state) < 300


def made(name: str, level: float, kind: str, **known: Any) -> Row:
    """A row of two columns, three training seeds and three repeats."""
    draws = np.random.default_rng(int(level * 10))
    seeds = [None] if kind == "base" else range(3)
    results = [
        Result(
            seed,
            {FID.title: list(level + draws.normal(0, 0.1, 3)),
             CLIP.title: list(30 / level + draws.normal(0, 0.01, 3))},
            seconds=0.0 if seed is None else 90.0,
            search={"evaluations": 110 + 10 * seed, "images": 48000, "seconds": 35.5}
            if kind == "merged" else None,
            coefficients=[0.5, 1.0] if kind == "merged" else [],
        )
        for seed in seeds
    ]  # fmt: skip
    costs = {} if kind == "base" else {"updates": 4000, "images": 512000, "flops": 2.5e12}
    return replace(Row(name, kind, results=results, **costs), **known)


@pytest.fixture
def comparison() -> Comparison:
    rows = [
        made("base", 10, "base", published=[12.25]),
        made("plain", 8, "finetune"),
        made("broken", 7, "finetune", results=[], failures=[REASON] * 3),
        made("later", 7, "finetune", results=[], pending=3, published=[77.5]),
        made("half at $5", 7, "finetune", results=made("", 7, "finetune").results[:1], pending=2),
        made("deme", 6, "merged", num_ranges=2, settings={"p": 0.3}, published=[5.125]),
    ]
    lines = ["ddim 50 steps", "every row that trains has the same updates and images " * 4]
    published = Published("the paper, Table 2", ["FID | CIFAR-10"])
    return Comparison("methods at $5 and $6", [FID, CLIP], rows, lines, published)


def tables_of(text: str) -> list[list[list[str]]]:
    """The Markdown tables, as cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        for block in blocks
    ]


def test_every_row_has_every_cell_and_a_failed_one_hides_no_other(comparison: Comparison) -> None:
    measured, _ = tables_of(markdown(comparison))
    assert measured[0] == [
        "row", "fid \N{DOWNWARDS ARROW}", "minus base [95 % interval]",
        "coco clip_score \N{UPWARDS ARROW}", "minus base [95 % interval]", "updates", "images",
        "TFLOP", "seconds of training", "search", "state",
    ]  # fmt: skip
    assert [line[0] for line in measured[2:]] == [escape(one.name) for one in comparison.rows]
    assert measured[7][5:10] == [
        "4,000", "512,000", "2.5", "90", "120 candidates, 48,000 images, 35.5 s",
    ]  # fmt: skip
    states = [line[-1] for line in measured[2:]]
    assert states[2].startswith(r"failed: runs/a\|b: loss is not finite \<nan>, see \`log\`")
    assert states[3:] == ["not run yet (3 of 3 seeds)", "not run yet (2 of 3 seeds)", DASH]
    bold = [(line[0], i) for line in measured[2:] for i, cell in enumerate(line) if "**" in cell]
    assert bold == [("deme", 1), ("deme", 3)]
    for index, expected in (1, ["base", r"half at \$5"]), (2, [r"half at \$5"]):
        marked = [line[0] for line in measured[2:] if line[index].endswith(DAGGER)]
        assert marked == expected, "figures of one training seed"
    bare = replace(comparison, rows=comparison.rows[:2])
    assert tables_of(markdown(bare))[0][0][-1] == "seconds of training"


def test_measured_and_published_figures_never_share_a_table(comparison: Comparison) -> None:
    text = markdown(comparison)
    own, theirs = text.split("## Published (the paper, Table 2; not measured here")
    for number in ("12.25", "5.125", "77.5"):
        assert number not in own
        assert number in theirs
    assert "±" not in theirs
    assert "Published" not in markdown(replace(comparison, published=Published()))


def test_the_report_says_what_was_compared_and_what_follows(comparison: Comparison) -> None:
    text = markdown(comparison)
    assert "- ddim 50 steps" in text
    seeds = "0.5, 1; 0.5, 1; 0.5, 1"
    assert f"- deme: merged of 2 ranges, p = 0.3; coefficients by training seed: {seeds}" in text
    assert "- fid: best is deme, told apart from every other row" in text


def test_nothing_in_a_name_is_taken_for_markup() -> None:
    texts = {
        "`x` <b>\n c": r"\`x\` \<b> c",
        "digits_fd _x_": r"digits_fd \_x\_",
        "[a](http://b)": r"[a\](http://b)",
        "# 2": r"\# 2",
        "1. one": r"1\. one",
        "-0.3 [-1, 1]": r"\-0.3 [-1, 1]",
    }
    assert {text: escape(text) for text in texts} == texts


def test_digits_follow_the_typical_spread_of_a_column() -> None:
    def shown(*spreads: float) -> str:
        rows = [row(f"{i}", [[10.0 - s], [10.0 + s]]) for i, s in enumerate(spreads)]
        return columns_of(Comparison("", [FID], rows, []))[1][1][-1].strip("*")

    assert shown(2e-3, 2e-3) == "10.0000 ± 0.0028"
    assert shown(2e-5, 0.3, 0.3) == "10.00 ± 0.42", "of one row alone it would be more"
    assert columns_of(Comparison("", [FID], [row("a", [[12.0]])], []))[1][1] == ["12.00"]


def test_the_document_is_json_and_agrees_with_the_cells(comparison: Comparison) -> None:
    shown = json.loads(json.dumps(document(comparison), allow_nan=False))
    for one, told in zip(comparison.rows, shown["rows"], strict=True):
        assert set(told) == {
            "name", "kind", "num_ranges", "settings", "results", "updates", "images", "flops",
            "failures", "pending", "metrics",
        }  # fmt: skip
        assert len(told["results"]) == len(one.results)
        for column in comparison.columns:
            cell = cell_of(one, column, comparison.rows[0])
            if cell is None:
                assert column.title not in told["metrics"]
                continue
            figure = told["metrics"][column.title]
            assert (figure["mean"], figure["sd"]) == (cell.mean, cell.sd)
            if cell.difference is not None:
                assert figure["difference"]["interval"] == list(cell.difference.interval)
    assert [(one["title"], one["lower_is_better"]) for one in shown["columns"]] == [
        ("fid", True), ("coco clip_score", False),
    ]  # fmt: skip
    assert shown["best"]["fid"] == {"row": "deme", "not_beaten": []}
    assert shown["published"]["rows"]["later"] == [77.5]
    lost = [Result(0, {FID.title: [float("nan"), float("inf")]})]
    rows = [comparison.rows[0], replace(comparison.rows[1], results=lost)]
    shown = json.loads(json.dumps(document(replace(comparison, rows=rows)), allow_nan=False))
    assert shown["rows"][1]["results"][0]["values"]["fid"] == [None, None]


def test_a_terminal_has_the_figures_and_several_metrics_leave_differences_out(
    comparison: Comparison,
) -> None:
    headings, cells = zip(*columns_of(comparison, brief=True), strict=True)
    assert [*headings[3:]] == ["updates", "TFLOP", "seconds of training"]
    assert cells[0][2:5] == ["broken (failed)", "later (not run yet)", "half at $5 (partial)"]
    one = dict(columns_of(replace(comparison, columns=[FID]), brief=True))
    assert re.fullmatch(r"-\d\.\d+ ± \d\.\d+", one["minus first"][-1])


def test_a_comparison_that_has_measured_nothing_is_still_told(comparison: Comparison) -> None:
    none = replace(comparison, columns=[], rows=comparison.rows[2:4])
    measured, _ = tables_of(markdown(none))
    assert [line[-1][:7] for line in measured[2:]] == ["failed:", "not run"]
    assert json.dumps(document(none))


def test_a_picture_has_a_panel_for_each_column(comparison: Comparison) -> None:
    columns = [replace(FID, measure=name) for name in "abcd"]
    rows = [
        replace(one, results=[
            replace(r, values={c.title: r.values["fid"] for c in columns}) for r in one.results
        ])
        for one in comparison.rows
    ]  # fmt: skip
    shown = replace(comparison, columns=columns, rows=rows)
    png, svg = draw(shown, "png"), draw(shown, "svg")
    with Image.open(io.BytesIO(png)) as image:
        assert 900 < image.width < 3000
        assert 400 < image.height < 3000
    text = svg.decode()
    assert text.count("is better") >= len(columns)
    for word in ("failed", "not run yet", "half at $5", "ddim 50 steps"):
        assert word in text
