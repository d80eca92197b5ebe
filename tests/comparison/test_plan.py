"""Plans: those that come with deme, and what is told of one that cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deme_cli.comparison.plan import SHIPPED, MeasurePlan, Plan, RowPlan, read_plan
from deme_cli.errors import ConfigError, MissingError

PLANS = ("sensitivity", "table1", "table2", "table3")
TABLE1 = {  # FID on CIFAR10, LSUN-Church, LSUN-Bedroom as the paper prints it
    "Before finetuning": [4.42, 10.69, 6.46],
    "SNR+1": [5.41, 10.80, 6.41],
    "Trun-SNR": [4.49, 10.81, 6.42],
    "Min-SNR-5": [5.77, 10.82, 6.41],
    "P2 weighting": [5.63, 10.77, 6.53],
    "ANT-NashMTL": [4.24, 10.45, 6.43],
    "ANT-UW": [4.21, 10.43, 6.48],
    "DeMe (before merge)": [3.79, 9.57, 5.87],
    "DeMe (after merge)": [3.51, 7.27, 5.84],
}
TWO = """
[[row]]
name = "Before"
kind = "base"
[[row]]
name = "Plain"
kind = "finetune"
"""
MEASURES = '[[measure]]\nname = "a"\n[[measure]]\nname = "a"\n'
PUBLISHED = '[published]\nsource = "them"\ncolumns = ["X", "Y"]\n'
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a plan into the current folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def written(text: str) -> str:
        Path("mine.toml").write_text(text)
        return "mine.toml"

    return written


def cited(plan: Plan) -> dict[str, list[float | None]]:
    return {row.name: row.published for row in plan.rows if row.published}


def row(text: str) -> str:
    """A plan of three rows, the last with these lines."""
    return f'{TWO}[[row]]\nname = "Odd"\n{text}\n'


def test_table1_has_the_nine_rows_of_the_paper_with_its_figures() -> None:
    plan = read_plan("table1")
    assert cited(plan) == TABLE1
    assert list(cited(plan)) == list(TABLE1), "in the paper's order"
    assert plan.published.columns == ["CIFAR10", "LSUN-Church", "LSUN-Bedroom"]
    assert (plan.n, plan.seeds, plan.rows[0].kind) == (4, [0, 1, 2], "base")


def test_table2_measures_three_sets_of_prompts_and_table3_cites_the_ablation() -> None:
    plan = read_plan("table2")
    assert [(one.name, one.eval["protocol"]) for one in plan.measures] == [
        ("MS-COCO", "bk-sdm-coco30k"), ("ImageNet", "imagenet"), ("PartiPrompts", "parti"),
    ]  # fmt: skip
    assert cited(plan)["DeMe (after merge)"] == [13.06, 30.11, 27.23, 27.09, 29.98]
    plan = read_plan("table3")
    figures = {
        kind: [value for one in plan.rows if one.kind == kind for value in one.published]
        for kind in ("finetune", "ensemble", "merged")
    }
    assert figures == {
        "finetune": [4.40, 4.45], "ensemble": [4.32, 4.27, 3.87], "merged": [4.32, 4.27, 3.87],
    }  # fmt: skip


def test_sensitivity_changes_n_or_p_and_nothing_else() -> None:
    plan = read_plan("sensitivity")
    for kind in ("ensemble", "merged"):
        rows = [one for one in plan.rows if one.kind == kind]
        assert [(one.n, one.finetune) for one in rows] == [
            (n, {"p": p}) for n, p in
            ((2, 0.3), (4, 0.3), (8, 0.3), (16, 0.3), (4, 0.0), (4, 0.1), (4, 0.5), (4, 0.7))
        ]  # fmt: skip


def test_a_plan_of_ones_own_says_as_much_as_it_must(write: Write) -> None:
    plan = read_plan(write(TWO))
    assert (plan.title, plan.n, plan.seeds, plan.updates) == ("mine", 4, [0, 1, 2], None)
    assert plan.rows == (RowPlan("Before", "base"), RowPlan("Plain", "finetune"))
    assert plan.measures == (MeasurePlan(),)
    assert (plan.budget, plan.tables, plan.published.columns) == ("updates", {}, [])


def test_rows_take_the_n_of_the_plan_or_their_own_and_published_figures_may_have_gaps(
    write: Write,
) -> None:
    text = f'n = 3\n{PUBLISHED}[[row]]\nname = "A"\nkind = "ensemble"\npublished = [1, ""]\n'
    plan = read_plan(write(text + '[[row]]\nname = "B"\nkind = "merged"\nn = 8\n'))
    assert [one.n for one in plan.rows] == [3, 8]
    assert [one.published for one in plan.rows] == [[1, None], []]


def test_a_file_of_ones_own_wins_over_the_shipped_plan_of_its_name_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("table3").mkdir()  # what an earlier `deme compare table3` has made
    assert read_plan("table3").title == "Table 3: ablation"
    shutil.copy(SHIPPED / "table3.toml", "table1.toml")
    assert read_plan("table1.toml").title.startswith("Table 3")
    assert read_plan("table1").title.startswith("Table 1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = [0]\n" + TWO, ["unknown key 'sed'", "did you mean 'seeds'?"]),
        ("[finetune]\nlearning = 1.0\n" + TWO, ["unknown key 'learning' in [finetune]"]),
        ("[finetune]\nseed = 3\n" + TWO, ["[finetune] seed: training seeds are those of `seeds`"]),
        (row('kind = "ensemble"\nfintune = {}'), ["row 'Odd'", "did you mean 'finetune'?"]),
        (row('kind = "ensemble"\nfinetune = { projecton = "fold" }'),
         ["row 'Odd'", "did you mean 'projection'?"]),
        (row('kind = "average"'), ["row 'Odd'", "base, finetune, ensemble, merged", "'average'"]),
        (TWO + '[[row]]\nkind = "base"\n', ["row 3", "needs a name"]),
        (row('kind = "ensemble"\n[row.eval]\nnum = 9'), ["row 'Odd'", "unknown key 'eval'"]),
        (row('kind = "finetune"\nfinetune = { steps = 9 }'), ["row 'Odd'", "steps follows from"]),
        (row('kind = "base"\nfinetune = { p = 0.1 }'), ["row 'Odd'", "takes no finetune"]),
        (row('kind = "ensemble"\nmerge = { seed = 1 }'), ["row 'Odd'", "takes no merge"]),
        (row('kind = "finetune"\nn = 4'), ["row 'Odd'", "takes no n"]),
        (row('kind = "ensemble"\nby = "noise"'), ["row 'Odd'", "log-snr"]),
        (row('kind = "base"').replace("Odd", "Plain"), ["each with a name"]),
        ('row = "one"\n', ["[[row]]"]),
        (MEASURES + TWO, ["every [[measure]] needs a name"]),
        ("[[measure]]\nname = 'a'\neval = { fit = '' }\n" + TWO, ["measure 'a'", "mean 'fid'?"]),
        (PUBLISHED + row('kind = "base"\npublished = [1.0]'), ["row 'Odd'", "expected 2 numbers"]),
        ("[published]\nsource = 'them'\n" + TWO, ["[published] needs source and columns"]),
        ("seeds = [1, 1]\n" + TWO, ["seeds = [1, 1]"]),
        ("seeds = [0.5]\n" + TWO, ["seeds = 0.5", "expected a whole number"]),
        ("n = 0\n" + TWO, ["n = 0", "expected 1 or more"]),
        ('budget = "time"\n' + TWO, ["budget = 'time'", "updates or compute"]),
        ("[[row]\n", ["not valid TOML"]),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_one_clear_line(write: Write, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_plan(write(text))
    message = str(caught.value)
    assert message.startswith("mine.toml: "), message
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["tabel1", "nowhere.toml"])
def test_a_plan_that_is_not_there_is_answered_with_those_that_are(write: Write, name: str) -> None:
    with pytest.raises(MissingError, match=", ".join(PLANS)) as caught:
        read_plan(name)
    assert str(caught.value).startswith(f"{name}: no such plan")
