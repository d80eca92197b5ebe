"""What `merge` refuses, and what it says: the right error, one line, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_tiny_expert

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.errors import ArtifactError, ConfigError, DemeError, MissingError, NumericsError

PAIR = ("ft_1of4.safetensors", "ft_3of4.safetensors")
MERGED = Path("merged.safetensors")
CMAES = ("--search", "cmaes", "--evaluations", "3")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(deme: Callable, error: type[DemeError], words: str, *arguments: object) -> None:
    """The command ends with `error` and one line with `words`; every file is as it was."""
    before = contents(Path())
    result = deme(*arguments)
    assert isinstance(result.exception, error), repr(result.exception)
    assert result.exception.exit_code == error("").exit_code
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.stdout == ""
    assert contents(Path()) == before


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["-w", "1,2", "--search", "grid"], ConfigError, "keep one"),
        (["-w", "1,2,3"], ConfigError, "3 coefficients for 2 experts"),
        (["-w", "1,x"], ConfigError, "expected numbers"),
        (["--grid", "0,1"], ConfigError, "--grid belongs to a search"),
        (["-w", "1,1", "--num", "3"], ConfigError, "--num belongs to a search"),
        (["--method", "slerp", "--seed", "3"], ConfigError, "--seed belongs to a search"),
        (["--evaluations", "5"], ConfigError, "--evaluations belongs to a search"),
        (["--per", "block"], ConfigError, "--per block says what a search varies"),
        (["--dtype", "fp8"], ConfigError, "--dtype fp8"),
        (["--base", "ft_2of4.safetensors"], ArtifactError, "was finetuned from base"),
        (["--base", "absent.safetensors"], MissingError, "no such file"),
        (["-o", "base.safetensors"], ConfigError, "--force"),
        (["absent.safetensors"], MissingError, "absent.safetensors"),
    ],
)
def test_wrong_usage_is_told(
    run_folder: Path, deme: Callable, words: list[str], error: type, message: str
) -> None:
    refuse(deme, error, message, "merge", *PAIR, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search", "simulated"], "expected one of none, grid"),
        (["--search", "grid", "--steps", "3"], "--steps are those of sampling"),
        (["--search", "grid", "--num", "0"], "above 0"),
        (["--search", "grid", "--grid", "0;0;0"], "3 lists of values for 2"),
        (["--search", "grid", "--grid", "0,x"], "--grid '0,x': expected numbers"),
        (["--search", "grid", "--per", "layer"], "search grid takes too many candidates"),
        (["--search", "grid", "--grid", "0,0.2,0.4,0.6", "--per", "block"], "give fewer values"),
        (["--search", "grid", "--objective", "fid", "--num", "1"], "at least 2"),
        ([*CMAES, "--grid", "0,1"], "add --search grid"),
        ([*CMAES, "--coefficients-for", "*=0,1"], "leaves nothing to search for"),
        ([*CMAES, "--ema-length", "0.1"], "--ema-length makes the coefficients itself"),
        (["--search", "cmaes", "--evaluations", "0"], "evaluations = 0: expected a number above 0"),
        ([*CMAES, "--seed", "2000003"], "set another report_seed"),
        ([*CMAES, "--seed", "2000005"], "set another report_seed"),
        ([*CMAES, "--method", "slerp"], "nothing to search for"),
        ([*CMAES, "--method", "model-stock"], "nothing to search for"),
        (["--search", "gradient", "--objective", "fid"], "found 'fid'; use --objective loss"),
        (["--search", "gradient", "--objective", "kid@8:2,loss"], "found 'kid'"),
    ],
)
def test_a_search_that_makes_no_sense_is_told_before_it_begins(
    run_folder: Path, deme: Callable, words: list[str], message: str
) -> None:
    refuse(deme, ConfigError, message, "merge", *PAIR, *words)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("bounds = [0,0.25]", "bounds 0,0.25 exclude the start 0.5 of expert 1of4"),
        ("bounds = [[0,1],[0.6,1]]", "exclude the start 0.5 of expert 3of4"),
        ("bounds = [[0,1],[0,1],[0,1]]", "3 pairs for 2 experts"),
        ("bounds = [1]", "expected the lowest and the highest"),
        ("bounds = [1,0]", "expected the lower bound first"),
        ("bounds = [0,inf]", "expected finite numbers"),
        ("bounds = [nan,1]", "expected finite numbers"),
        ("start = [0.1]", "the start has 1 values for 2 experts"),
        ("start = [3,0]", "exclude the start 3"),
        ('time = "x"', "time 'x': expected a duration, as 90s, 30m or 2h"),
        ('time = "0s"', "time '0s': expected a duration"),
        ("report_repeats = 0", "report_repeats = 0: expected a number above 0"),
        ('method = "ties"\ntrim = "all"', "expected one of model, tensor"),
        ('method = "regmean"', "expected one of linear, ties"),
        ('search = "gp"', "expected one of none, grid"),
        ('optimizer = "adam"', "unknown key 'optimizer'"),
    ],
)
def test_a_run_file_that_makes_no_sense_is_told_before_a_search_begins(
    run_folder: Path, deme: Callable, table: str, message: str
) -> None:
    Path("deme.toml").write_text(f"[merge]\n{table}\n")
    refuse(deme, ConfigError, message, "merge", *PAIR, *([] if "search" in table else CMAES))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lss", "objective 'lss': expected loss, experts, kid, fid, or several"),
        ("loss,kid", "how many does it keep for the next? as loss:16"),
        ("loss:3,kid:5,fid", "'kid:5' keeps 5; expected at most the 3"),
        ("loss:0,kid", "expected at least 1"),
        ("loss:3,kid@x,fid", "objective 'kid@x'"),
        ("loss:3,kid@0:2,fid", "0 is no number of draws or images"),
        ("loss:3,kid@1.2345k:2,fid", "1.2345k is no number of draws or images"),
        ("loss:3,", "objective ''"),
        ("loss:3;fid", "objective 'loss:3;fid'"),
    ],
)
def test_a_ladder_that_does_not_parse_is_told(
    run_folder: Path, deme: Callable, text: str, message: str
) -> None:
    refuse(deme, ConfigError, message, "merge", *PAIR, *CMAES, "--objective", text)


def test_a_space_in_a_ladder_does_no_harm(run_folder: Path, deme: Callable) -> None:
    words = ("--objective", " loss:2, kid@8", "--steps", "2", "--dry-run")
    for search in ("cmaes", "gradient"):
        assert deme("merge", *PAIR, "--search", search, *words).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--density", "0.5"], "--density belongs to ties and dare; add --method ties"),
        (["--method", "ties", "--density", "0"], "density = 0.0: expected a share above 0"),
        (["--method", "ties", "--density", "1.5"], "density = 1.5: expected a share above 0"),
        (["--method", "stew"], "expected one of linear, ties"),
        (["--method", "slerp", "-w", "0.5,0.6"], "w_1 + w_2 = 1, found 1.1"),
        (["--method", "slerp", "ft_2of4.safetensors"], "slerp merges 2 experts, found 3"),
        (["--method", "model-stock", "-w", "1,1"], "finds the coefficients itself; leave out -w"),
        (["--method", "slerp", "--per", "block"], "--per block goes with methods linear"),
        (["--ema-length", "0.1"], "is no power-function EMA"),
    ],
)
def test_options_of_another_method_are_told(
    run_folder: Path, deme: Callable, words: list[str], message: str
) -> None:
    refuse(deme, ConfigError, message, "merge", *PAIR, *words)


@pytest.mark.parametrize("search", [(), CMAES], ids=["given", "searched"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mid_blok.*=1,1", "'mid_blok.*' matches no tensor of this model; near names: mid_block.*"),
        ("mid_block.*", "expected GLOB=w1,w2"),
        ("=1,1", "expected GLOB=w1,w2"),
        ("mid_block.*=1,x", "--coefficients-for mid_block.*= '1,x': expected numbers"),
        ("mid_block.*=1,nan", "expected finite numbers"),
        ("mid_block.*=1", "1 coefficients where there are 2 experts"),
    ],
)
def test_coefficients_of_a_glob_that_do_not_fit_are_told(
    run_folder: Path, deme: Callable, text: str, message: str, search: tuple[str, ...]
) -> None:
    words = ("merge", *PAIR, *search, "--coefficients-for", text)
    refuse(deme, ConfigError, message, *words)


def test_nothing_to_merge_is_told(run_folder: Path, deme: Callable) -> None:
    refuse(deme, ConfigError, "name experts or task vectors", "merge")


FOREIGN = ["my notes\n", '{"trial": 1}\n', "my notes\nwithout an end", "\0\1\2"]


@pytest.mark.parametrize("text", FOREIGN)
def test_a_file_in_the_place_of_a_journal_is_kept(
    run_folder: Path, deme: Callable, text: str
) -> None:
    journal = Path("merged.trials.jsonl")
    journal.write_text(text)
    for words in ((*PAIR, *CMAES, "--num", "8", "--no-report"), ("--show", journal)):
        result = deme("merge", *words)
        assert isinstance(result.exception, ConfigError), repr(result.exception)
        assert "holds no journal of trials that this deme reads" in str(result.exception)
        assert journal.read_text() == text
    assert not MERGED.exists()


@pytest.mark.parametrize("search", ["grid", "cmaes", "gradient"])
def test_one_expert_alone_is_searched_as_well(
    run_folder: Path, deme: Callable, search: str
) -> None:
    words = ("--search", search, "--num", "8", "--json")
    limit = () if search == "grid" else ("--evaluations", "3")
    result = deme("merge", PAIR[0], *words, *limit)
    assert result.exit_code == 0, repr(result.exception)
    document = json.loads(result.stdout)
    assert len(document["coefficients"]) == 1
    assert [row["name"] for row in document["report"]["rows"]] == ["base", "1/N each", "merged"]


def spoil(path: str) -> None:
    """Make one weight of an expert not a number."""
    weights = load_tensors(Path(path))
    weights["conv_in.bias"][0] = float("nan")
    write_artifact(Path(path), weights, read_record(Path(path)))


@pytest.mark.parametrize(
    "words",
    [
        ("--search", "grid", "--grid", "0,0.5"),
        ("--search", "random", "--evaluations", "4"),
        ("--search", "cmaes", "--evaluations", "8"),
        ("--search", "tpe", "--evaluations", "12"),
        ("--search", "gradient", "--evaluations", "3"),
    ],
    ids=lambda words: words[1],
)  # fmt: skip
def test_candidates_that_are_not_finite_are_passed_over_and_counted(
    run_folder: Path, deme: Callable, words: tuple[str, ...]
) -> None:
    spoil(PAIR[0])
    result = deme("merge", *PAIR, *words, "--num", "8", "--no-report", "--json")
    assert result.exit_code == 0, repr(result.exception)
    document = json.loads(result.stdout)
    assert document["coefficients"][0] == 0
    assert document["search"]["values"]["mean"] is None
    assert "trials had no finite objective; skipped" in result.stderr
    if "gradient" in words:
        assert "the descent ended at a point whose objective was not finite" in result.stderr


def test_a_model_that_is_not_finite_is_a_row_of_the_report_without_figures(
    run_folder: Path, deme: Callable
) -> None:
    spoil(PAIR[0])
    result = deme("merge", *PAIR, "--search", "grid", "--num", "8", "--json")
    assert result.exit_code == 0, repr(result.exception)

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    document = json.loads(result.stdout, parse_constant=no_constant)
    rows = {row["name"]: row["metrics"]["loss"] for row in document["report"]["rows"]}
    broken = {"value": None, "values": [None] * 3, "difference": None, "interval": [None] * 2,
              "gain_kept": None}  # fmt: skip
    assert rows["1/N each"] == rows["expert 1of4"] == broken
    assert rows["merged"]["value"] > 0
    assert "not finite" in result.stderr


@pytest.mark.parametrize("objective", ["loss", "fid"])
def test_a_base_that_is_not_finite_ends_a_search_with_5(
    run_folder: Path, deme: Callable, objective: str
) -> None:
    base = Path("base.safetensors")
    weights = load_tensors(base)
    weights["conv_in.bias"][0] = float("nan")
    write_artifact(base, weights, read_record(base))
    for index in (1, 3):
        write_tiny_expert(Path(f"ft_{index}of4.safetensors"), base, index=index, of=4)
    sampled = ("--steps", "2") if objective == "fid" else ()
    result = deme("merge", *PAIR, "--search", "random", "--evaluations", "3", "--num", "8",
                  "--objective", objective, *sampled)  # fmt: skip
    assert isinstance(result.exception, NumericsError)
    assert result.exception.exit_code == 5
    assert "not finite" in str(result.exception)
    assert not MERGED.exists()
    reported = deme("merge", *PAIR, "-w", "0,0", "--report", "--num", "8")
    assert isinstance(reported.exception, NumericsError)
    assert "not finite" in str(reported.exception)
    assert not MERGED.exists()
