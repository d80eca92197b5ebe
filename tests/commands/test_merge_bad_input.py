"""What `merge` refuses, and what it says: the right error, one line, nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_tiny_expert

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.errors import NumericsError

PAIR = ("ft_1of4.safetensors", "ft_3of4.safetensors")
MERGED = Path("merged.safetensors")
GRID = ("--search", "grid")
CMAES = ("--search", "cmaes", "--evaluations", "3")


WRONG = [
    (["-w", "1,2", *GRID], 2, "keep one"),
    (["--grid", "0,1"], 2, "--grid belongs to a search"),
    (["--method", "slerp", "--seed", "3"], 2, "--seed belongs to a search"),
    (["--per", "block"], 2, "--per block says what a search varies"),
    (["--density", "0.5"], 2, "--density belongs to ties and dare"),
    (["--method", "ties", "--density", "1.5"], 2, "density = 1.5: expected a share"),
    (["--method", "stew"], 2, "expected one of linear, ties"),
    (["--method", "slerp", "-w", "0.5,0.6"], 2, "w_1 + w_2 = 1, found 1.1"),
    (["--method", "slerp", "ft_2of4.safetensors"], 2, "merges 2 experts, found 3"),
    (["--method", "model-stock", "-w", "1,1"], 2, "finds the coefficients itself"),
    (["--method", "slerp", "--per", "block"], 2, "goes with methods linear"),
    (["--ema-length", "0.1"], 2, "is no power-function EMA"),
    (["--ema-length", "0.1", "-w", "1,1"], 2, "--ema-length makes the coefficients"),
    (["--coefficients-for", "mid_blok.*=1,1"], 2, "near names: mid_block.*"),
    (["--coefficients-for", "mid_block.*"], 2, "expected GLOB=w1,w2"),
    (["--coefficients-for", "mid_block.*=1"], 2, "1 coefficients where there are 2"),
    ([*GRID, "--steps", "3"], 2, "--steps belongs to sampling"),
    ([*GRID, "--grid", "0;0;0"], 2, "grid has 3 lists for 2 experts"),
    ([*GRID, "--grid", "0,x"], 2, "--grid '0,x': expected numbers"),
    ([*GRID, "--per", "layer"], 2, "search grid takes too many candidates"),
    ([*GRID, "--grid", "0,1,2,3", "--per", "block"], 2, "give fewer values"),
    ([*GRID, "--objective", "fid", "--num", "1", "--dry-run"], 2, "at least 2"),
    ([*CMAES, "--grid", "0,1"], 2, "add --search grid"),
    ([*CMAES, "--coefficients-for", "*=0,1"], 2, "leaves nothing to search for"),
    ([*CMAES, "--coefficients-for", "mid_blok.*=1,1"], 2, "near names: mid_block.*"),
    ([*CMAES, "--seed", "2000005"], 2, "set another report_seed"),
    ([*CMAES, "--method", "model-stock"], 2, "nothing to search for"),
    (["--search", "gradient", "--objective", "kid@8:2,loss"], 2, "found 'kid'"),
    (["--replay", "base.safetensors", "--dry-run"], 2, "--dry-run goes with a merge"),
    (["--show", "merged.safetensors"], 3, "no journal of its search beside it"),
]
RUN_FILES = [
    ("[merge]\nbounds = [0,0.25]", "bounds 0,0.25 exclude the start 0.5 of expert 1of4"),
    ("[merge]\nbounds = [[0,1],[0.6,1]]", "exclude the start 0.5 of expert 3of4"),
    ("[merge]\nbounds = [1]", "expected the lowest and the highest"),
    ("[merge]\nstart = [0.1]", "start: 1 values for 2 experts"),
    ('[merge]\ntime = "0s"', "time '0s': expected a duration, as 90s, 30m or 2h"),
    ('[merge]\nloss_range = "50:500"', "reaches past the 100 timesteps"),
    ("[merge]\ncoefficients = [0.5, 0.5]\nsearch = 'grid'", "keep one of the two"),
]


def test_wrong_usage_and_a_run_file_that_makes_no_sense_are_told_before_anything_begins(
    run_folder: Path, refuse: Callable
) -> None:
    for words, exit_code, message in WRONG:
        refuse(exit_code, message, "merge", *PAIR, *words)
    for table, message in RUN_FILES:
        Path("deme.toml").write_text(f"{table}\n")
        words = [] if "search" in table else CMAES
        refuse(2, message, "merge", *PAIR, *words)


def test_images_that_are_missing_and_nothing_to_merge_are_told(
    run_folder: Path, refuse: Callable
) -> None:
    refuse(2, "name experts or task vectors", "merge")
    Path("deme.toml").write_text('[data]\nsource = "nowhere"\n')
    refuse(3, "nowhere", "merge", *PAIR, *GRID)


def spoil(path: str) -> None:
    """Make one weight of an artifact not a number."""
    weights = load_tensors(Path(path))
    weights["conv_in.bias"][0] = float("nan")
    write_artifact(Path(path), weights, read_record(Path(path)))


@pytest.mark.parametrize(
    "words",
    [
        ("--search", "cmaes", "--evaluations", "8"),
        ("--search", "gradient", "--evaluations", "3"),
    ],
    ids=lambda words: words[1],
)
def test_candidates_that_are_not_finite_are_passed_over_and_counted(
    run_folder: Path, deme: Callable, words: tuple[str, ...]
) -> None:
    spoil(PAIR[0])
    Path("deme.toml").write_text("[merge]\nreport_repeats = 1\n")
    result = deme("merge", *PAIR, *words, "--num", "8", "--json")
    assert result.exit_code == 0, repr(result.exception)
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", result.stdout)), "it is JSON"
    document = json.loads(result.stdout)
    assert document["coefficients"][0] == 0
    rows = {row["name"]: row["metrics"]["loss"] for row in document["report"]["rows"]}
    assert rows["1/N each"]["value"] is rows["expert 1of4"]["value"] is None
    assert rows["merged"]["value"] > 0
    assert document["search"]["values"]["mean"] is None
    assert "trials had no finite objective; skipped" in result.stderr
    if "gradient" in words:
        assert "the descent ended at a point whose objective was not finite" in result.stderr
    alone = deme("merge", PAIR[0], "-w", "1", "-o", "alone.safetensors")
    assert isinstance(alone.exception, NumericsError)


def test_a_base_that_is_not_finite_ends_a_search_with_5(run_folder: Path, deme: Callable) -> None:
    spoil("base.safetensors")
    for index in (1, 3):
        path = Path(f"ft_{index}of4.safetensors")
        write_tiny_expert(path, Path("base.safetensors"), index=index, of=4)
    search = ("--search", "random", "--evaluations", "3", "--num", "8")
    for words in ((*search, "--objective", "fid", "--steps", "2"), ("-w", "0,0", "--report")):
        assert deme("merge", *PAIR, *words).exception.exit_code == 5
    assert not MERGED.exists()
