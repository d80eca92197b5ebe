from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from deme_cli.comparison.figures import Column, Comparison, Result, RowResult, SearchCost, cell_of
from deme_cli.comparison.plan import Published
from deme_cli.comparison.table import csv_text, document, escape, markdown, terminal_rows

FID, ACCURACY = Column("fid", "ddim"), Column("accuracy", "ddim", lower_is_better=False)
REASON = "runs/a|b: loss is not finite <nan>,\n see `log`"


def row(name: str, level: float, kind: str, **known) -> RowResult:
    draws = np.random.default_rng(int(level * 10))
    results = tuple(
        Result(
            None if kind == "base" else seed,
            {
                FID: tuple((level + draws.normal(0, 0.1, 3)).tolist()),
                ACCURACY: tuple((1 / level + draws.normal(0, 0.01, 3)).tolist()),
            },
            seconds=0.0 if kind == "base" else 90.0,
            search=SearchCost(120, 48000, 35.5) if kind == "merged" else None,
        )
        for seed in range(1 if kind == "base" else 3)
    )
    costs = {} if kind == "base" else {"updates": 4000, "images": 512000, "flops": 2.5e12}
    return replace(RowResult(name, kind, 1, {}, results, **costs), **known)


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        title="methods",
        columns=(FID, ACCURACY),
        rows=(
            row("base", 10, "base", published=(12.25,)),
            row("plain", 8, "finetune"),
            row("broken", 7, "finetune", results=(), failures=(REASON,) * 3),
            row("later", 7, "finetune", results=(), pending=3, published=(77.5,)),
            row("half", 7, "finetune", results=row("half", 7, "finetune").results[:1], pending=2),
            row("deme", 6, "merged", settings={"method": "ties"}, published=(5.125,)),
        ),
        protocol=("ddim 50 steps",),
        published=Published("the paper, Table 2", ("FID | CIFAR-10",)),
    )


def tables_of(text: str) -> list[list[list[str]]]:
    """The Markdown tables, as cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        for block in blocks
    ]


def test_every_row_has_every_cell_and_a_failed_one_hides_no_other(comparison: Comparison) -> None:
    measured, _ = tables_of(markdown(comparison))
    assert {len(line) for line in measured} == {11}
    assert [line[0] for line in measured[2:]] == [one.name for one in comparison.rows]
    assert all("±" in measured[index][1] for index in (2, 3, 6, 7))
    states = [line[-1] for line in measured[2:]]
    assert states[2].startswith(r"failed: runs/a\|b: loss is not finite \<nan>, see \`log\`")
    assert states[3:5] == ["not run yet (3 of 3 seeds)", "not run yet (2 of 3 seeds)"]
    assert states[0] == states[1] == "\N{EN DASH}"


def test_only_the_best_of_each_column_is_bold(comparison: Comparison) -> None:
    measured, published = tables_of(markdown(comparison))
    bold = [(line[0], i) for line in measured[2:] for i, cell in enumerate(line) if "**" in cell]
    assert bold == [("deme", 1), ("deme", 3)]
    assert not any("**" in cell for line in published for cell in line)


def test_figures_of_one_training_seed_carry_a_dagger(comparison: Comparison) -> None:
    measured, _ = tables_of(markdown(comparison))
    for index, expected in (1, ["base", "half"]), (2, ["half"]):
        marked = [line[0] for line in measured[2:] if line[index].endswith("\N{DAGGER}")]
        assert marked == expected


def test_costs_share_one_unit_and_a_search_is_told(comparison: Comparison) -> None:
    measured, _ = tables_of(markdown(comparison))
    assert measured[0][5:10] == ["updates", "images", "TFLOP", "seconds of training", "search"]
    assert measured[7][5:9] == ["4,000", "512,000", "2.5", "90"]
    assert measured[7][9] == "120 candidates, 48,000 images, 35.5 s"
    bare = replace(comparison, rows=comparison.rows[:2])
    assert tables_of(markdown(bare))[0][0][-1] == "seconds of training"


def test_measured_and_published_figures_never_share_a_table(comparison: Comparison) -> None:
    text = markdown(comparison)
    own, theirs = text.split("## Published (the paper, Table 2; not measured here")
    for number in ("12.25", "5.125", "77.5"):
        assert number not in own
        assert number in theirs
    assert "±" not in theirs
    assert tables_of(theirs)[0][3] == ["plain", "\N{EN DASH}"]
    assert "Published" not in markdown(replace(comparison, published=None))


def test_the_report_says_what_was_compared_and_what_follows(comparison: Comparison) -> None:
    text = markdown(comparison)
    assert "training seeds: 3; evaluation seeds of each: 3" in text
    assert "- ddim 50 steps" in text
    assert "- deme: merged of 1 ranges, method = ties" in text
    assert "ddim fid: best is deme, told apart from every other row" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", r"a\|b"),
        ("`x` <b>\n c", r"\`x\` \<b> c"),
        ("digits_fd _x_", r"digits_fd \_x\_"),
        ("[a](http://b)", r"[a\](http://b)"),
        ("# 2", r"\# 2"),
        ("1. one", r"1\. one"),
        ("-0.3 [-1, 1]", r"\-0.3 [-1, 1]"),
    ],
)
def test_nothing_in_a_name_is_taken_for_markup(text: str, expected: str) -> None:
    assert escape(text) == expected


def test_the_csv_parses_back_to_the_same_numbers(comparison: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    measured = [line for line in lines if line["source"] == "measured" and not line["error"]]
    found = {
        (line["row"], line["seed"], line["metric"], int(line["repeat"])): float(line["value"])
        for line in measured
    }
    expected = {
        (one.name, "" if r.seed is None else str(r.seed), column.metric, repeat): value
        for one in comparison.rows
        for r in one.results
        for column, values in r.values.items()
        for repeat, value in enumerate(values)
    }
    assert found == expected
    assert len(measured) == len(expected)
    assert all(float(line["flops"]) == 2.5e12 for line in measured if line["row"] != "base")
    assert {line["search_images"] for line in measured if line["row"] == "deme"} == {"48000"}


def test_the_csv_marks_failures_and_published_figures(comparison: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    failed = [line for line in lines if line["error"]]
    assert {(line["row"], line["value"]) for line in failed} == {("broken", "")}
    assert failed[0]["error"] == " ".join(REASON.split())
    published = [line for line in lines if line["source"] == "published"]
    assert [(line["row"], line["value"]) for line in published] == [
        ("base", "12.25"), ("later", "77.5"), ("deme", "5.125"),
    ]  # fmt: skip
    assert {line["kind"] for line in published} == {"published"}
    assert {line["citation"] for line in published} == {"the paper, Table 2"}


def test_the_document_is_json_and_agrees_with_the_cells(comparison: Comparison) -> None:
    shown = json.loads(json.dumps(document(comparison), allow_nan=False))
    for one, told in zip(comparison.rows, shown["rows"], strict=True):
        assert "published" not in told
        assert len(told["results"]) == len(one.results)
        assert (told["pending"], len(told["failures"])) == (one.pending, len(one.failures))
        for column in comparison.columns:
            cell = cell_of(one, column, comparison.rows[0])
            if cell is None:
                assert column.title not in told["metrics"]
                continue
            figure = told["metrics"][column.title]
            assert (figure["mean"], figure["sd"]) == (cell.mean, cell.sd)
            if cell.difference is not None:
                assert figure["difference"]["interval"] == list(cell.difference.interval)
                assert figure["difference"]["over"] == cell.difference.over
    assert shown["best"]["ddim fid"]["row"] == "deme"
    assert shown["published"]["rows"]["later"] == [77.5]


def test_what_is_not_finite_is_null_in_the_document(comparison: Comparison) -> None:
    lost = Result(0, {FID: (float("nan"), float("inf"))})
    rows = (comparison.rows[0], replace(comparison.rows[1], results=(lost,)))
    shown = json.dumps(document(replace(comparison, rows=rows)), allow_nan=False)
    assert json.loads(shown)["rows"][1]["results"][0]["values"]["ddim fid"] == [None, None]


def test_one_metric_fits_a_terminal_of_80_columns(comparison: Comparison) -> None:
    named = replace(comparison.rows[-1], name="DeMe with coefficients searched on held-out loss")
    one = replace(comparison, columns=(FID,), rows=(*comparison.rows, named))
    columns, lines = terminal_rows(one)
    assert {len(line) for line in lines} == {len(columns)} == {6}
    assert lines[2][0].split() == ["broken", "(failed)"]
    widths = [
        max(len(part) for cell in cells for part in cell.split("\n"))
        for cells in zip(columns, *lines, strict=True)
    ]
    stream = io.StringIO()
    sheet = Table(*columns, box=None, pad_edge=False)
    for line in lines:
        sheet.add_row(*line)
    Console(file=stream, width=80).print(sheet)
    assert sum(widths) + 2 * (len(widths)) <= 80
    assert all(cell in stream.getvalue() for line in lines for cell in line[1:])


def test_several_metrics_leave_their_differences_to_the_report(comparison: Comparison) -> None:
    columns, _ = terminal_rows(comparison)
    assert not any("minus" in name for name in columns)
    assert len(columns) == 6


def test_a_comparison_that_has_measured_nothing_is_still_told(comparison: Comparison) -> None:
    none = replace(comparison, columns=(), rows=comparison.rows[2:4])
    (measured, _), (columns, lines) = tables_of(markdown(none)), terminal_rows(none)
    assert [line[-1][:7] for line in measured[2:]] == ["failed:", "not run"]
    assert columns[0] == "row"
    assert len(lines) == 2
    assert json.dumps(document(none))
    assert len(csv_text(none).splitlines()) == 1 + 3 + 1
