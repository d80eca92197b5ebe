"""Plans: those that come with deme, and what is told of one that cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deme_cli.comparison.jobs import slug
from deme_cli.comparison.plan import (
    SHIPPED,
    MeasurePlan,
    Plan,
    RowPlan,
    finetune_settings,
    read_plan,
    shipped_plans,
)
from deme_cli.config import EvalConfig, MergeConfig, SampleConfig
from deme_cli.errors import ConfigError, MissingError

TABLE1 = {  # FID on CIFAR10, LSUN-Church, LSUN-Bedroom as the paper prints it
    "Before finetuning": (4.42, 10.69, 6.46),
    "SNR+1": (5.41, 10.80, 6.41),
    "Trun-SNR": (4.49, 10.81, 6.42),
    "Min-SNR-5": (5.77, 10.82, 6.41),
    "P2 weighting": (5.63, 10.77, 6.53),
    "ANT-NashMTL": (4.24, 10.45, 6.43),
    "ANT-UW": (4.21, 10.43, 6.48),
    "DeMe (before merge)": (3.79, 9.57, 5.87),
    "DeMe (after merge)": (3.51, 7.27, 5.84),
}
TABLE2 = {  # MS-COCO FID and CLIP score, ImageNet FID and CLIP score, PartiPrompts CLIP score
    "Before finetuning": (13.42, 29.88, 27.62, 27.07, 29.78),
    "SNR+1": (13.92, 29.96, 27.56, 27.03, 29.86),
    "Trun-SNR": (13.93, 29.95, 27.60, 27.05, 29.85),
    "Min-SNR-5": (13.92, 29.93, 27.59, 27.02, 29.87),
    "P2 weighting": (13.23, 29.93, 26.92, 26.44, 29.50),
    "ANT-NashMTL": (13.39, 29.81, 27.41, 26.99, 29.90),
    "ANT-UW": (13.17, 29.94, 26.91, 26.78, 29.98),
    "DeMe (before merge)": (12.78, 29.85, 26.36, 26.90, 30.02),
    "DeMe (after merge)": (13.06, 30.11, 27.23, 27.09, 29.98),
}
TWO = """
[[row]]
name = "Before"
kind = "base"
[[row]]
name = "Plain"
kind = "finetune"
"""
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a plan into the current folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def written(text: str) -> str:
        Path("mine.toml").write_text(text)
        return "mine.toml"

    return written


def cited(plan: Plan) -> dict[str, tuple[float | None, ...]]:
    return {row.name: row.published for row in plan.rows if row.published}


def row(text: str) -> str:
    """A plan of three rows, the last with these lines."""
    return f'{TWO}[[row]]\nname = "Odd"\n{text}\n'


@pytest.mark.parametrize("name", shipped_plans())
def test_every_shipped_plan_has_settings_that_go_together(name: str) -> None:
    plan = read_plan(name)
    assert plan.seeds == (0, 1, 2)
    assert plan.rows[0].kind == "base", "what the others are compared with"
    assert len({slug(one.name) for one in plan.rows}) == len(plan.rows), "folders of their own"
    for one in plan.rows:
        if one.kind != "base":
            finetune_settings(one, plan.tables, updates=80_000)
        MergeConfig(**{**plan.tables.get("merge", {}), **one.merge})
    for measure in plan.measures:
        SampleConfig(**measure.sample)
        EvalConfig(**measure.eval)


def test_every_plan_file_in_the_package_is_offered() -> None:
    assert shipped_plans() == ["sensitivity", "table1", "table2", "table3"]
    assert {path.name for path in SHIPPED.iterdir()} == {f"{one}.toml" for one in shipped_plans()}


def test_table1_has_the_nine_rows_of_the_paper_with_its_figures() -> None:
    plan = read_plan("table1")
    assert cited(plan) == TABLE1
    assert list(cited(plan)) == list(TABLE1), "in the paper's order"
    assert plan.published.columns == ("CIFAR10", "LSUN-Church", "LSUN-Bedroom")
    assert "Table 1" in plan.published.source
    assert plan.n == 4


def test_the_rows_of_table1_train_as_their_names_say() -> None:
    rows = {one.name: one for one in read_plan("table1").rows}

    def settings(name: str):
        return finetune_settings(rows[name], {}, updates=80_000)

    plain = settings("Plain finetuning")
    assert (plain.loss_weighting, plain.multitask, plain.steps) == ("none", "none", 80_000)
    assert settings("SNR+1").loss_weighting == "snr+1"
    assert settings("Trun-SNR").loss_weighting == "truncated-snr"
    min_snr, p2 = settings("Min-SNR-5"), settings("P2 weighting")
    assert (min_snr.loss_weighting, min_snr.weighting_gamma) == ("min-snr", 5.0)
    assert (p2.loss_weighting, p2.weighting_gamma, p2.weighting_k) == ("p2", 1.0, 1.0)
    assert settings("ANT-NashMTL").multitask == "nashmtl"
    assert settings("ANT-UW").multitask == "uw"
    before, after = rows["DeMe (before merge)"], rows["DeMe (after merge)"]
    assert (before.kind, before.n, after.kind, after.n) == ("ensemble", 4, "merged", 4)
    assert before.finetune == after.finetune == {"p": 0.3, "consistency": 1.0, "projection": "fold"}
    assert settings("DeMe (before merge)").steps == 20_000


def test_table2_has_the_nine_rows_of_the_paper_with_its_figures_and_prompts() -> None:
    plan = read_plan("table2")
    assert cited(plan) == TABLE2
    measured = [(one.name, one.eval["protocol"]) for one in plan.measures]
    assert measured == [
        ("MS-COCO", "bk-sdm-coco30k"), ("ImageNet", "imagenet"), ("PartiPrompts", "parti"),
    ]  # fmt: skip
    assert plan.tables["model"]["source"] == "CompVis/stable-diffusion-v1-4"


def test_table3_has_the_figures_of_the_ablation() -> None:
    plan = read_plan("table3")
    figures = [value for one in plan.rows if one.kind != "merged" for value in one.published]
    assert figures == [4.40, 4.45, 4.32, 4.27, 3.87]
    merged = [value for one in plan.rows if one.kind == "merged" for value in one.published]
    assert merged == [4.32, 4.27, 3.87]
    projected = next(one for one in plan.rows if one.name == "N = 1, projection")
    assert finetune_settings(projected, plan.tables, updates=8).projection == "fold"
    experts = [one for one in plan.rows if one.kind == "ensemble"]
    used = [finetune_settings(one, plan.tables, updates=8) for one in experts]
    assert {one.n for one in experts} == {8}
    assert [(one.p, one.consistency, one.projection) for one in used] == [
        (0.0, 0.0, "none"), (0.3, 0.0, "none"), (0.3, 1.0, "none"), (0.3, 1.0, "fold"),
    ]  # fmt: skip


def test_sensitivity_changes_n_or_p_and_nothing_else() -> None:
    plan = read_plan("sensitivity")
    for kind in ("ensemble", "merged"):
        rows = [one for one in plan.rows if one.kind == kind]
        assert [(one.n, one.finetune["p"]) for one in rows] == [
            (2, 0.3), (4, 0.3), (8, 0.3), (16, 0.3), (4, 0.0), (4, 0.1), (4, 0.5), (4, 0.7),
        ]  # fmt: skip
        assert all(set(one.finetune) == {"p"} and not one.merge for one in rows)


def test_a_plan_of_ones_own_says_as_much_as_it_must(write: Write) -> None:
    plan = read_plan(write(TWO))
    assert (plan.title, plan.n, plan.seeds, plan.updates) == ("mine", 4, (0, 1, 2), None)
    assert plan.rows == (RowPlan("Before", "base", 1), RowPlan("Plain", "finetune", 1))
    assert plan.measures == (MeasurePlan(),)
    assert (plan.budget, plan.tables, plan.published) == ("updates", {}, None)


def test_rows_take_the_n_of_the_plan_or_their_own(write: Write) -> None:
    text = 'n = 3\n[[row]]\nname = "A"\nkind = "ensemble"\n[[row]]\nname = "B"\nkind = "merged"\n'
    assert [one.n for one in read_plan(write(text + "n = 8\n")).rows] == [3, 8]


def test_published_figures_may_have_gaps(write: Write) -> None:
    head = '[published]\nsource = "them"\ncolumns = ["X", "Y"]\n'
    text = head + TWO + 'published = [1, ""]\n'
    assert [one.published for one in read_plan(write(text)).rows] == [(), (1.0, None)]


def test_a_shipped_plan_is_found_although_its_own_results_lie_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("table3").mkdir()  # what an earlier `deme compare table3` has made
    assert read_plan("table3").title == "Table 3: ablation"


def test_a_file_of_ones_own_wins_over_the_shipped_plan_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(SHIPPED / "table3.toml", "table1.toml")
    assert read_plan("table1.toml").title.startswith("Table 3")
    assert read_plan("table1").title.startswith("Table 1")


MEASURES = '[[measure]]\nname = "a"\n[[measure]]\nname = "a"\n'
PUBLISHED = '[published]\nsource = "them"\ncolumns = ["X", "Y"]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = [0]\n" + TWO, ["unknown key 'sed'", "did you mean 'seeds'?"]),
        ("[split]\nn = 2\n" + TWO, ["unknown key 'split'"]),
        ("[finetune]\nlearning = 1.0\n" + TWO, ["unknown key 'learning' in [finetune]"]),
        ("finetune = 3\n" + TWO, ["finetune should be a table"]),
        ("[finetune]\nseed = 3\n" + TWO, ["[finetune] seed: training seeds are those of `seeds`"]),
        ("[merge]\nserch = 'grid'\n" + TWO, ["in [merge]", "did you mean 'search'?"]),
        ("[eval]\nnum = 'all'\n" + TWO, ["[eval] num = 'all'", "expected a whole number"]),
        (row('kind = "ensemble"\nfintune = {}'), ["row 'Odd'", "did you mean 'finetune'?"]),
        (
            row('kind = "ensemble"\nfinetune = { projecton = "fold" }'),
            ["row 'Odd'", "did you mean 'projection'?"],
        ),
        (row('kind = "ensemble"\nfinetune = "fold"'), ["row 'Odd'", "finetune should be a table"]),
        (row('kind = "average"'), ["row 'Odd'", "base, finetune, ensemble, merged", "'average'"]),
        (row("n = 2"), ["row 'Odd'", "kind = ''"]),
        (TWO + '[[row]]\nkind = "base"\n', ["row 3", "needs a name"]),
        (
            row('kind = "ensemble"\n[row.sample]\nsteps = 9'),
            ["row 'Odd'", "[sample]", "[[measure]"],
        ),
        (row('kind = "ensemble"\n[row.eval]\nnum = 9'), ["row 'Odd'", "its own [eval]"]),
        (row('kind = "finetune"\nfinetune = { steps = 9 }'), ["row 'Odd'", "steps follows from"]),
        (row('kind = "ensemble"\nfinetune = { seed = 9 }'), ["row 'Odd'", "seed follows from"]),
        (row('kind = "base"\nfinetune = { p = 0.1 }'), ["row 'Odd'", "takes no finetune"]),
        (row('kind = "ensemble"\nmerge = { seed = 1 }'), ["row 'Odd'", "takes no merge"]),
        (row('kind = "finetune"\nn = 4'), ["row 'Odd'", "takes no n"]),
        (row('kind = "finetune"\nby = "snr"'), ["row 'Odd'", "takes no by"]),
        (row('kind = "ensemble"\nby = "noise"'), ["row 'Odd'", "by = 'noise'", "log-snr"]),
        (row('kind = "ensemble"\nn = 0'), ["row 'Odd'", "n = 0"]),
        (row('kind = "ensemble"\nn = "two"'), ["n = 'two'", "expected a whole number"]),
        (row('name = "Plain"\nkind = "base"').replace('name = "Odd"\n', ""), ["each with a name"]),
        ('[[row]]\nname = "Alone"\nkind = "base"\n', ["two [[row]] or more", "['Alone']"]),
        ("", ["two [[row]] or more"]),
        ('row = "one"\n', ["[[row]]"]),
        (MEASURES + TWO, ["every [[measure]] needs a name"]),
        (MEASURES.replace('name = "a"\n', "") + TWO, ["every [[measure]] needs a name"]),
        (MEASURES.replace('name = "a"\n', "", 1) + TWO, ["every [[measure]] needs a name"]),
        ("[[measure]]\nname = 'a'\n[measure.merge]\n" + TWO, ["measure 'a'", "key 'merge'"]),
        ("[[measure]]\nname = 'a'\neval = { fit = '' }\n" + TWO, ["measure 'a'", "mean 'fid'?"]),
        (PUBLISHED + row('kind = "base"\npublished = [1.0]'), ["row 'Odd'", "expected 2 numbers"]),
        (PUBLISHED + row('kind = "base"\npublished = ["x", 1]'), ["row 'Odd'", "expected 2 num"]),
        (row('kind = "base"\npublished = [1.0]'), ["row 'Odd'", "expected 0 numbers"]),
        ("[published]\nsource = 'them'\n" + TWO, ["[published] needs source and columns"]),
        ("[published]\nsource = 'us'\ncolumns = 'FID'\n" + TWO, ["[published] needs"]),
        ("seeds = [-1]\n" + TWO, ["seeds = [-1]", "distinct whole numbers"]),
        ("seeds = [1, 1]\n" + TWO, ["seeds = [1, 1]"]),
        ("seeds = []\n" + TWO, ["seeds = []"]),
        ('seeds = ["a"]\n' + TWO, ["seeds = ['a']"]),
        ("seeds = [0.5]\n" + TWO, ["seeds = [0.5]"]),
        ("seeds = 3\n" + TWO, ["seeds = 3", "expected a list"]),
        ('n = "four"\n' + TWO, ["n = 'four'", "expected a whole number"]),
        ("n = true\n" + TWO, ["n = True", "expected a whole number"]),
        ("n = 0\n" + TWO, ["n = 0", "expected 1 or more"]),
        ("updates = 0\n" + TWO, ["updates = 0", "expected 1 or more"]),
        ("updates = 1.5\n" + TWO, ["updates = 1.5", "expected a whole number"]),
        ('budget = "time"\n' + TWO, ["budget = 'time'", "updates or compute"]),
        ("title = 3\n" + TWO, ["title = 3", "expected text"]),
        ("[[row]\n", ["not valid TOML"]),
    ],
)
def test_a_plan_that_cannot_be_is_one_clear_line(write: Write, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_plan(write(text))
    message = str(caught.value)
    assert message.startswith("mine.toml: "), message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_file_that_is_no_text_is_refused(write: Write) -> None:
    name = write("")
    Path(name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_plan(name)


@pytest.mark.parametrize("name", ["tabel1", "nowhere.toml"])
def test_a_plan_that_is_not_there_is_answered_with_those_that_are(write: Write, name: str) -> None:
    with pytest.raises(MissingError, match="sensitivity, table1, table2, table3") as caught:
        read_plan(name)
    assert str(caught.value).startswith(f"{name}: no such plan")
