"""What may be said of a table: better only where the interval of the difference says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deme_cli.reporting.comparisons import comparison
from deme_cli.reporting.evaluations import evaluation
from deme_cli.reporting.measures import Difference, Measure, verdict


def _rows(*interval: float, value: float = 2.0, kind: str = "merged") -> list[Measure]:
    mean = sum(interval) / 2 if interval else 0.0
    difference = Difference("base", mean, 0.1, *interval) if interval else None
    return [
        Measure("base", "base", 3.0, 0.1, 10, 3),
        Measure("new", kind, value, 0.1, 10, 3, difference),
    ]


@pytest.mark.parametrize(("metric", "rows", "said", "unsaid"), [
    ("fid", _rows(-1.2, -0.8), "better than base by 1.00 (95 % interval of the difference over "
     "evaluation seeds: [\N{MINUS SIGN}1.20, \N{MINUS SIGN}0.80])", "not told"),
    ("fid", _rows(-1.2, 0.1), "not told apart from base", "better than"),
    ("fid", _rows(-1.2, 0.0), "not told apart from base", "better than"),
    ("fid", _rows(), "nothing is claimed", "better than"),
    ("fid", _rows(0.5, 1.5, value=4.0), "no row has a better mean than base", "better than base"),
    ("accuracy", _rows(0.5, 1.5, value=4.0), "better than base by 1.00", "not told"),
    ("accuracy", _rows(-1.2, -0.8), "no row has a better mean than base", "by 1.00"),
    ("fid", _rows(-1.2, -0.8)[:1], "no other row to compare", "better than"),
    ("fid", _rows(float("nan"), 1.0, value=2.0), "nothing is claimed", "better than"),
    ("fid", [*_rows(-1.2, -0.8, kind="ensemble"),
             Measure("m", "merged", 3.5, 0.1, 10, 3, Difference("base", 0.5, 0.1, 0.4, 0.6))],
     "m 3.50 ± 0.10, worse than base by 0.50", "m is best"),
])  # fmt: skip
def test_nothing_is_claimed_that_the_interval_does_not_show(
    metric: str, rows: list[Measure], said: str, unsaid: str
) -> None:
    sentence = verdict(metric, rows)
    assert said in sentence
    assert unsaid not in sentence


def test_an_end_of_an_interval_beside_0_is_not_written_as_0() -> None:
    assert Difference("base", 0.933, 0.374, 0.0028, 1.863).interval == "[+0.003, +1.863]"
    assert Difference("base", -1.37, 0.052, -1.5, -1.239).text.startswith(
        "\N{MINUS SIGN}1.370 ± 0.052"
    )


def test_a_table_shows_every_metric_and_marks_what_differs(told_run: Path) -> None:
    document = json.loads((told_run / "eval.json").read_text())
    first, second = document["rows"]
    first["metrics"]["accuracy"] = {
        "value": 0.5,
        "sd": None,
        "n": 70,
        "repeats": 1,
        "values": [0.5],
    }
    second["protocol"]["steps"] = 99
    found = evaluation("eval.json", document)
    assert [c for c in found.table.columns if "\N{UPWARDS ARROW}" in c] == [
        "accuracy \N{UPWARDS ARROW}"
    ]
    assert {len(row) for row in found.table.rows} == {len(found.table.columns)}
    assert found.table.rows[0][-1].text == "70 \N{MULTIPLICATION SIGN} 2"
    marks = {field.name: field.mark for field in found.cards[1].fields}
    assert (marks["steps"], marks["fingerprints"], marks["sampler"]) == ("differs", "by row", "")
    assert "The rows differ in steps: compare with care." in found.remarks


@pytest.mark.parametrize("spoil", [
    lambda d: d["rows"][0].pop("name"), lambda d: d.update(rows=[]), lambda d: d.update(rows=[1]),
    lambda d: d["rows"][0]["metrics"]["frechet_digits"].update(value="much"),
    lambda d: d["rows"][0]["metrics"]["frechet_digits"].update(value=10**400),
    lambda d: d["rows"][1]["metrics"]["frechet_digits"]["difference"].update(interval=[1]),
    lambda d: [row.update(metrics={"frechet_digits": None}) for row in d["rows"]],
])  # fmt: skip
def test_a_table_of_another_shape_is_noted(
    told_copy: Path, page_of: Callable, spoil: Callable
) -> None:
    document = json.loads((told_copy / "eval.json").read_text())
    spoil(document)
    (told_copy / "eval.json").write_text(json.dumps(document))
    page, folder = page_of(told_copy)
    assert not page.section("results")
    assert [one.name for one in folder.unread] == ["eval.json"]
    assert "not a whole table" in page.section("artifacts")


def _cell(mean: float, **more: object) -> dict:
    return {"mean": mean, "seed_means": [mean], "sd": None, "repeats_sd": 0.1, "num_repeats": 3,
            "difference": None, **more}  # fmt: skip


def test_a_comparison_keeps_published_figures_apart() -> None:
    trained = [{"seed": 0, "seconds": 10.0}, {"seed": 1, "seconds": 20.0}]
    other = {"to": "a", "mean": -1.0, "sd": 0.1, "interval": [-1.5, -0.5], "over": "training seeds"}
    document = {
        "title": "Mine", "reading": ["fid: best is b"], "protocol": ["one protocol"],
        "columns": [{"title": "fid", "metric": "fid"}], "cards": {"": {"steps": 20}},
        "rows": [
            {"name": "a", "kind": "base", "metrics": {"fid": _cell(3.0)}, "updates": 0, "flops": 0,
             "results": [{"seed": None, "seconds": 0}]},
            {"name": "b", "kind": "merged", "updates": 1600, "flops": 3e11, "pending": 1,
             "metrics": {"fid": _cell(2.0, sd=0.1, difference=other)}, "results": trained},
            {"name": "c", "kind": "finetune", "metrics": {}, "results": [], "updates": 1600,
             "flops": 3e11, "failures": ["no   memory"]},
        ],
        "published": {"source": "Somebody", "columns": ["C"], "rows": {"a": [4.4], "b": [None]}},
    }  # fmt: skip
    found = comparison("compare.json", document)
    rows = [[cell.text for cell in row] for row in found.table.rows]
    assert rows[0][1] == "3.00 ± 0.10\N{DAGGER}"
    assert rows[1][1:3] == [
        "2.00 ± 0.10",
        "\N{MINUS SIGN}1.00 ± 0.10 [\N{MINUS SIGN}1.50, \N{MINUS SIGN}0.50]",
    ]
    assert rows[1][4:] == ["2", "1,600", "300", "15"]
    assert found.table.rows[1][2].tone == "better"
    notes = [row[0].note for row in found.table.rows]
    assert notes[1:] == ["merged; 1 seeds not run yet", "finetune; failed: no memory"]
    assert found.more[0].caption.startswith("Published: Somebody; not measured here")
    assert [cell.text for cell in found.more[0].rows[0]] == ["a", "4.4"]
