"""`task-vector`, and `merge` with given coefficients, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_tiny_expert

from deme_cli import merge
from deme_cli.artifacts import fingerprint_file, load_tensors, read_record, write_artifact
from deme_cli.config import MergeConfig
from deme_cli.run_file import read_run_file

PAIR = ("ft_1of4.safetensors", "ft_3of4.safetensors")


def test_task_vectors_lie_beside_their_experts(
    run_folder: Path, deme: Callable, refuse: Callable
) -> None:
    result = deme("task-vector", *sorted(run_folder.glob("ft_*")), "--json")
    document = json.loads(result.stdout)
    assert [Path(path).name for path in document["paths"]] == [
        f"tv_{index}of4.safetensors" for index in range(1, 5)
    ]
    assert len(document["cosines"]) == 4
    record = read_record(run_folder / "tv_2of4.safetensors", "task-vector")
    assert record.norms == document["norms"][1]
    assert "Cosines" in result.stderr
    refuse(2, "--force", "task-vector", PAIR[0])
    result = deme("task-vector", PAIR[0], "-o", "vectors")
    assert result.stdout.strip() == "vectors/tv_1of4.safetensors"
    twin = run_folder / "more" / PAIR[0]
    write_tiny_expert(twin, run_folder / "base.safetensors", index=1, of=4, scale=0.1)
    refuse(2, "would both be written", "task-vector", PAIR[0], twin, "-o", "others")


def test_a_free_span_names_its_vector(run_folder: Path, deme: Callable) -> None:
    span = run_folder / "span.safetensors"
    record = write_tiny_expert(span, run_folder / "base.safetensors", index=2, of=5)
    write_artifact(span, load_tensors(span), replace(record, index=None, of=None))
    assert deme("task-vector", span, "-o", ".").stdout.strip() == "tv_20-40.safetensors"
    merged = deme("merge", "tv_20-40.safetensors", PAIR[0], "-w", "1,0.5")
    assert merged.exit_code == 0


def test_given_coefficients_follow_the_arguments(run_folder: Path, deme: Callable) -> None:
    document = json.loads(deme("merge", *PAIR, "-w", "0.25,0.5", "--json").stdout)
    assert document["schema_version"] == 1
    assert document["paths"] == [document["path"]] == ["merged.safetensors"]
    assert document["coefficients"] == [0.25, 0.5]
    assert (document["objective"], document["evaluations"]) == (None, 0)
    assert document["search"] is document["report"] is None
    assert document["fingerprint"] == fingerprint_file(run_folder / "merged.safetensors")
    deme("merge", *reversed(PAIR), "-w", "0.5,0.25", "-o", "same.safetensors")
    record = read_record(run_folder / "same.safetensors", "merged")
    assert [expert["range"] for expert in record.parents] == [[50, 75], [0, 25]]
    result = deme("merge", *PAIR, "-o", "mean.safetensors")
    assert "1/2 each" in result.stderr
    assert read_record(run_folder / "mean.safetensors").coefficients == [0.5, 0.5]


def test_a_list_goes_by_the_ranges_in_the_run_file_and_by_the_arguments_elsewhere(
    run_folder: Path, deme: Callable
) -> None:
    """On the command line and in Python alike, for coefficients and for lists of a search."""
    (run_folder / "deme.toml").write_text(
        '[data]\nsource = "digits"\n[merge]\ncoefficients = [0.1, 0.2, 0.3]\n'
        "grid = [[0.0], [0.5], [1.0]]\nbounds = [[0.0, 1.0], [-1.0, 2.0], [0, 2]]\n"
        "start = [0.25, 1.5, 0.0]\nnum = 8\nreport = false\nevaluations = 2\n"
    )
    paths, run = [Path(f"ft_{i}of4.safetensors") for i in (2, 3, 1)], read_run_file(None)
    deme("merge", *paths)
    made = merge(paths, None, run=run, output=Path("b.safetensors"))
    for record in (read_record(Path("merged.safetensors")), made.record):
        assert record.coefficients == [0.2, 0.3, 0.1]
    deme("merge", *paths, "-w", "0.1,0.2,0.3", "-o", "c.safetensors")
    given = run.settings(MergeConfig, coefficients=[0.1, 0.2, 0.3])
    made = merge(paths, given, run=run, output=Path("d.safetensors"))
    for record in (read_record(Path("c.safetensors")), made.record):
        assert record.coefficients == [0.1, 0.2, 0.3]
    deme("merge", *paths, "--search", "grid", "-o", "f.safetensors")
    assert read_record(Path("f.safetensors")).search["grid"] == [[0.5], [1.0], [0.0]]
    words = ("--search", "random", "-o", "g.safetensors", "--json")
    drawn = json.loads(deme("merge", *paths, *words).stdout)
    assert drawn["search"]["bounds"] == [[-1, 2], [0, 2], [0, 1]]
    shown = json.loads(deme("merge", "--show", "g.safetensors", "--json").stdout)
    assert shown["trials"][2]["coefficients"] == {"2of4": 1.5, "3of4": 0.0, "1of4": 0.25}


@pytest.mark.parametrize("words", [(), ("--search", "grid", "--grid", "0,0.5")])
def test_dry_run_checks_and_writes_nothing(
    run_folder: Path, deme: Callable, words: tuple[str, ...]
) -> None:
    before = sorted(run_folder.iterdir())
    result = deme("merge", *PAIR, *words, "--dry-run", "--json")
    assert json.loads(result.stdout)["dry_run"] is True
    assert "would merge 2 artifacts" in result.stderr
    assert sorted(run_folder.iterdir()) == before
