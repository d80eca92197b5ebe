"""`deme analyze task-vectors` finds the experts, says how far they moved, and draws it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_base, write_tiny_expert
from typer.testing import Result

from deme_cli.analysis.task_vectors.measure import measure_task_vectors
from deme_cli.analysis.task_vectors.reading import read_task_vectors
from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.merging.lineage import open_family, open_parents

Deme = Callable[..., Result]
ANALYZE = ("analyze", "task-vectors")


def stand_still(expert: Path) -> None:
    """Give an expert the weights of the base."""
    write_artifact(expert, load_tensors(Path("base.safetensors")), read_record(expert))


def test_the_file_the_pictures_and_the_sentence(deme: Deme, run_folder: Path) -> None:
    for index in (3, 4):  # as in the paper: these moved farther
        path = Path(f"ft_{index}of4.safetensors")
        write_tiny_expert(path, Path("base.safetensors"), index=index, of=4, scale=0.06)
    stand_still(Path("ft_2of4.safetensors"))
    result = deme(*ANALYZE, "--json")
    assert result.exit_code == 0, result.exception
    shown = json.loads(result.stdout)
    assert shown["paths"] == [f"task-vectors.{kind}" for kind in ("json", "png", "svg")]
    assert Path("task-vectors.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in Path("task-vectors.svg").read_text()
    document = json.loads(Path("task-vectors.json").read_text())
    assert document["kind"] == "task-vectors"
    assert document["reading"] == shown["reading"]
    assert shown["reading"] in result.stderr
    assert "longer above t = 50 than below, as in the paper (ratio" in shown["reading"]
    assert "50 % if unrelated" in shown["reading"]
    assert "3.0 independent directions of 4" in shown["reading"]
    assert "no cosine where nothing moved (25:50)" in shown["reading"]
    assert document["relative_norm"]["ratio"] == pytest.approx(6, rel=0.05)
    ranges = ["0:25", "25:50", "50:75", "75:100"]
    assert [row["range"] for row in shown["experts"]] == ranges
    assert [one["range"] for one in document["protocol"]["experts"]] == ranges
    fingerprint = read_record(Path("base.safetensors")).fingerprint
    assert document["protocol"]["base"]["fingerprint"] == fingerprint
    pairs = document["pairs"]
    assert pairs["cosines"][1] == [None] * 4
    others = np.delete(np.delete(np.array(pairs["cosines"], float), 1, 0), 1, 1)
    assert np.abs(others - np.eye(3)).max() < 0.05  # independent noise
    assert pairs["mean_sign_conflict"] == pytest.approx(0.5, abs=0.01)
    assert pairs["same_sign_in_all_if_unrelated"] == 0.125
    assert pairs["directions"] == pytest.approx(3, abs=0.01)
    assert "NaN" not in result.stdout
    blocks = [row["name"] for row in document["blocks"]]
    assert blocks == [
        "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "other"
    ]  # fmt: skip
    assert not list(Path().glob(".task-vectors*"))


def test_one_vector_alone_is_measured_without_pairs_or_ranks(deme: Deme, run_folder: Path) -> None:
    assert deme("task-vector", "ft_1of4.safetensors").exit_code == 0
    result = deme(*ANALYZE, "tv_1of4.safetensors", "--no-ranks", "-o", "one.json", "--json")
    assert result.exit_code == 0, result.exception
    document = json.loads(Path("one.json").read_text())
    assert document["pairs"] is None
    assert "effective_ranks" not in document["tensors"][0]
    assert "cosine" not in json.loads(result.stdout)["reading"]


def test_experts_without_a_common_element_are_told(run_folder: Path) -> None:
    stand_still(Path("ft_2of4.safetensors"))
    parents = open_parents([Path(f"ft_{i}of4.safetensors") for i in (1, 2)], "expert")
    family = open_family(Path("base.safetensors"), parents)
    *_, found = measure_task_vectors(family, Path("x.json"), ranks=False)
    assert "no two experts moved the same elements; no cosine where nothing moved (25:50)" in (
        read_task_vectors(found)
    )


def test_a_dry_run_writes_nothing_and_needs_no_torch(
    deme: Deme, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(Path().iterdir())
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now fails
    result = deme(*ANALYZE, "--dry-run")
    assert result.exit_code == 0, result.exception
    assert "4 experts of base.safetensors: 144 tensors" in result.stderr
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["base.safetensors"], ArtifactError, "expected an artifact of kind 'expert'"),
        (["none.safetensors"], MissingError, "no such file"),
        (["ft_1of4.safetensors"] * 2, ConfigError, "are the same expert"),
        (["--base", "other.safetensors"], ArtifactError, "was finetuned from base"),
        (["ft_1of4.safetensors", "ft_1of1.safetensors"], ArtifactError, "was finetuned from base"),
        (["-o", "x.txt"], ConfigError, "ends in .json"),
        (["-o", "taken.json"], ConfigError, "taken.json exists; add --force"),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    deme: Deme, run_folder: Path, arguments: list, error: type, message: str
) -> None:
    Path("taken.json").write_text("{}")
    write_tiny_base(Path("other.safetensors"), seed=1)
    write_tiny_expert(Path("ft_1of1.safetensors"), Path("other.safetensors"), index=1, of=1)
    before = sorted(Path().iterdir())
    result = deme(*ANALYZE, *arguments)
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)
    assert sorted(Path().iterdir()) == before


def test_a_folder_without_experts_is_told_how_to_train_them(
    deme: Deme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = deme(*ANALYZE)
    assert isinstance(result.exception, MissingError)
    assert f"{tmp_path}: no experts" in str(result.exception)
    assert "`deme finetune --range all`" in str(result.exception)
    assert "Example: deme analyze task-vectors" in deme(*ANALYZE, "--help").stdout
