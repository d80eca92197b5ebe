"""`task-vector`, and `merge` with given coefficients, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_expert

from deme_cli import merge
from deme_cli.artifacts import fingerprint_file, load_tensors, read_record, write_artifact
from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError, MissingError
from deme_cli.run_file import read_run_file

PAIR = ("ft_1of4.safetensors", "ft_3of4.safetensors")
GRID = ("--search", "grid", "--grid", "0,0.5;0,1", "--num", "16", "--no-report")


def test_task_vectors_lie_beside_their_experts(run_folder: Path, deme: Callable) -> None:
    result = deme("task-vector", *sorted(run_folder.glob("ft_*")), "--json")
    document = json.loads(result.stdout)
    assert [Path(path).name for path in document["paths"]] == [
        f"tv_{index}of4.safetensors" for index in range(1, 5)
    ]
    assert len(document["cosines"]) == 4
    record = read_record(run_folder / "tv_2of4.safetensors", "task-vector")
    assert record.norms == document["norms"][1]
    assert "Cosines" in result.stderr
    result = deme("task-vector", "ft_1of4.safetensors")
    assert isinstance(result.exception, ConfigError)
    assert "--force" in str(result.exception)
    result = deme("task-vector", "ft_1of4.safetensors", "-o", "vectors")
    assert result.stdout.strip() == "vectors/tv_1of4.safetensors"


def test_a_free_span_names_its_vector(run_folder: Path, deme: Callable) -> None:
    record = write_tiny_expert(
        run_folder / "span.safetensors", run_folder / "base.safetensors", index=2, of=5
    )
    assert record.range == [20, 40]
    weights = load_tensors(run_folder / "span.safetensors")
    write_artifact(run_folder / "span.safetensors", weights, replace(record, index=None, of=None))
    assert deme("task-vector", "span.safetensors").stdout.strip() == "tv_20-40.safetensors"
    assert deme("task-vector", PAIR[0]).exit_code == 0
    merged = deme("merge", "tv_20-40.safetensors", "tv_1of4.safetensors", "-w", "1,0.5")
    assert merged.exit_code == 0


def test_two_experts_of_one_name_do_not_overwrite_each_other(
    run_folder: Path, deme: Callable
) -> None:
    base, twin = run_folder / "base.safetensors", run_folder / "more" / PAIR[0]
    record = write_tiny_expert(twin, base, index=1, of=4, scale=0.1)
    assert record.index == 1
    result = deme("task-vector", PAIR[0], twin, "-o", "vectors")
    assert isinstance(result.exception, ConfigError)
    assert "would both be written" in str(result.exception)


def test_given_coefficients_follow_the_arguments(run_folder: Path, deme: Callable) -> None:
    result = deme("merge", *PAIR, "-w", "0.25,0.5", "--json")
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["path"] == "merged.safetensors"
    assert document["paths"] == ["merged.safetensors"]
    assert document["coefficients"] == [0.25, 0.5]
    assert (document["objective"], document["evaluations"]) == (None, 0)
    assert document["search"] is None
    assert document["report"] is None
    assert document["fingerprint"] == fingerprint_file(run_folder / "merged.safetensors")
    deme("merge", *reversed(PAIR), "-w", "0.5,0.25", "-o", "same.safetensors")
    record = read_record(run_folder / "same.safetensors", "merged")
    assert [expert["range"] for expert in record.parents] == [[50, 75], [0, 25]]


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
def test_a_list_goes_by_the_ranges_in_the_run_file_and_by_the_arguments_elsewhere(
    run_folder: Path, deme: Callable, order: tuple[int, ...]
) -> None:
    """On the command line and in Python alike, for coefficients and for lists of a search."""
    (run_folder / "deme.toml").write_text(
        '[data]\nsource = "digits"\n[merge]\ncoefficients = [0.1, 0.2, 0.3]\n'
        "grid = [[0.0], [0.5], [1.0]]\nnum = 8\nreport = false\n"
    )
    paths, run = [Path(f"ft_{i + 1}of4.safetensors") for i in order], read_run_file(None)
    told = [[0.1, 0.2, 0.3][i] for i in order]
    deme("merge", *paths)
    assert read_record(Path("merged.safetensors")).coefficients == told
    for settings in (None, run.settings(MergeConfig), run.settings(MergeConfig, density=0.1)):
        made = merge(paths, settings, run=run, output=Path("b.safetensors"), force=True)
        assert made.record.coefficients == told
    deme("merge", *paths, "-w", "0.1,0.2,0.3", "-o", "c.safetensors")
    given = run.settings(MergeConfig, coefficients=[0.1, 0.2, 0.3])
    for record in (
        read_record(Path("c.safetensors")),
        merge(paths, given, run=run, output=Path("d.safetensors")).record,
        merge(
            paths, MergeConfig(coefficients=[0.1, 0.2, 0.3]), output=Path("e.safetensors")
        ).record,
    ):
        assert record.coefficients == [0.1, 0.2, 0.3]
    deme("merge", *paths, "--search", "grid", "-o", "f.safetensors")
    searched = merge(paths, run.settings(MergeConfig, search="grid"), run=run, force=True)
    grid = [[[0.0], [0.5], [1.0]][i] for i in order]
    assert read_record(Path("f.safetensors")).search["grid"] == grid
    assert searched.record.search["grid"] == grid
    assert searched.record.fingerprint == read_record(Path("f.safetensors")).fingerprint


def test_lists_of_a_search_in_the_run_file_follow_the_ranges(
    run_folder: Path, deme: Callable
) -> None:
    words = ("merge", *reversed(PAIR), "--num", "8", "--no-report", "--evaluations", "2", "--json")
    (run_folder / "deme.toml").write_text(
        '[data]\nsource = "digits"\n[merge]\ngrid = [[1.0], [0.5]]\n'
        "bounds = [[0.0, 1.0], [-1.0, 2.0]]\nstart = [0.25, 1.5]\n"
    )
    grid = json.loads(deme(*words, "--search", "grid", "-o", "a.safetensors").stdout)
    assert grid["search"]["grid"] == [[0.5], [1.0]]
    drawn = json.loads(deme(*words, "--search", "random", "-o", "b.safetensors").stdout)
    assert drawn["search"]["bounds"] == [[-1, 2], [0, 1]]
    shown = json.loads(deme("merge", "--show", "b.safetensors", "--json").stdout)
    assert shown["trials"][2]["coefficients"] == {"3of4": 1.5, "1of4": 0.25}


def test_without_coefficients_each_expert_counts_alike(run_folder: Path, deme: Callable) -> None:
    result = deme("merge", *PAIR)
    assert "1/2 each" in result.stderr
    assert result.stdout.strip() == "merged.safetensors"
    assert read_record(run_folder / "merged.safetensors").coefficients == [0.5, 0.5]


@pytest.mark.parametrize("given", [(), ("-w", "0.25,0.75")])
def test_globs_have_coefficients_of_their_own(
    run_folder: Path, deme: Callable, given: tuple[str, ...]
) -> None:
    result = deme(
        "merge", *PAIR, *given, "--coefficients-for", "mid_block.attentions.*=1,0",
        "--coefficients-for", "mid_block.*=0,1",
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    theta = load_tensors(run_folder / "base.safetensors")
    tau = [
        {name: tensor - theta[name] for name, tensor in load_tensors(run_folder / path).items()}
        for path in PAIR
    ]
    others = (0.25, 0.75) if given else (0.5, 0.5)
    for name, merged in load_tensors(run_folder / "merged.safetensors").items():
        w = others
        if name.startswith("mid_block."):
            w = (1, 0) if name.startswith("mid_block.attentions.") else (0, 1)
        expected = theta[name] + w[0] * tau[0][name] + w[1] * tau[1][name]
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)
    assert "0.75" in result.stderr or not given


def test_dry_run_checks_and_writes_nothing(run_folder: Path, deme: Callable) -> None:
    before = sorted(run_folder.iterdir())
    result = deme("merge", *PAIR, *GRID, "--dry-run", "--json")
    assert json.loads(result.stdout)["dry_run"] is True
    assert "would merge 2 artifacts" in result.stderr
    assert deme("merge", *PAIR, "--dry-run").stdout == ""
    assert sorted(run_folder.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        ("--search", "gradient", "--objective", "kid"),
        ("--search", "grid", "--per", "block", "--grid", "0,0.5,1,2"),
        ("--search", "cmaes", "--objective", "kid", "--num", "1"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(
    run_folder: Path, deme: Callable, words: tuple[str, ...]
) -> None:
    told = [deme("merge", *PAIR, *words, *dry).exception for dry in (["--dry-run"], [])]
    assert isinstance(told[0], ConfigError)
    assert str(told[0]) == str(told[1])


def test_wrong_settings_in_the_run_file_are_told(run_folder: Path, deme: Callable) -> None:
    (run_folder / "deme.toml").write_text('[merge]\nsearch = "grid"\ncoefficients = [0.5, 0.5]\n')
    assert "keep one of the two" in str(deme("merge", *PAIR).exception)
    (run_folder / "deme.toml").write_text('[data]\nsource = "nowhere"\n')
    result = deme("merge", *PAIR, *GRID)
    assert isinstance(result.exception, MissingError)
    assert "nowhere" in str(result.exception)
