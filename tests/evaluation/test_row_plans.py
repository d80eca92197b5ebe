"""Which rows the table has, from headers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_base, write_tiny_expert

from deme_cli.artifacts import SamplesRecord, write_artifact
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.row_plans import folder_rows, plan_rows

EXPERTS = [f"ft_{index}of4.safetensors" for index in range(1, 5)]


def table(*arguments: str) -> list[tuple[str, str]]:
    return [(plan.name, plan.kind) for plan in plan_rows(arguments).plans]


def test_experts_that_cover_all_timesteps_are_one_row(run_folder: Path) -> None:
    rows = plan_rows(["base.safetensors", *EXPERTS])
    assert table("base.safetensors", *EXPERTS) == [("base", "base"), ("ensemble", "ensemble")]
    assert rows.plans[1].arguments == tuple(EXPERTS)
    assert rows.warnings == []


def test_an_expert_of_all_timesteps_is_a_row_of_its_own(run_folder: Path) -> None:
    write_tiny_expert(Path("control.safetensors"), Path("base.safetensors"), index=1, of=1)
    assert table("control.safetensors", *EXPERTS) == [
        ("control", "expert"),
        ("ensemble", "ensemble"),
    ]


def test_two_divisions_of_one_base_are_two_ensembles(run_folder: Path) -> None:
    for index in (1, 2):
        path = Path(f"ft_{index}of2.safetensors")
        write_tiny_expert(path, Path("base.safetensors"), index=index, of=2)
    names = table(*EXPERTS, "ft_1of2.safetensors", "ft_2of2.safetensors")
    assert names == [("ensemble-4", "ensemble"), ("ensemble-2", "ensemble")]


def test_experts_of_two_bases_are_two_ensembles(run_folder: Path) -> None:
    write_tiny_base(Path("other.safetensors"), seed=1)
    others = [f"other_{index}of4.safetensors" for index in range(1, 5)]
    for index, path in enumerate(others, start=1):
        write_tiny_expert(Path(path), Path("other.safetensors"), index=index, of=4)
    assert [kind for _, kind in table(*EXPERTS, *others)] == ["ensemble", "ensemble"]


def test_experts_that_leave_a_gap_are_rows_with_a_warning(run_folder: Path) -> None:
    rows = plan_rows(EXPERTS[:3])
    assert [plan.kind for plan in rows.plans] == ["expert"] * 3
    assert len(rows.warnings) == 3
    assert "timesteps 0:25" in rows.warnings[0]


def test_without_arguments_the_folder_makes_the_rows(run_folder: Path) -> None:
    names = [plan.name for plan in folder_rows(Path("base.safetensors")).plans]
    assert names == ["base", "ensemble"]
    Path(EXPERTS[0]).unlink()
    rows = folder_rows(Path("base.safetensors"))
    assert [plan.name for plan in rows.plans] == ["base"]
    assert "ft_2of4" in rows.warnings[0]


def test_an_empty_folder_has_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nothing to measure"):
        folder_rows(tmp_path / "base.safetensors")


def test_samples_and_image_folders_are_rows(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.zeros((3, 8, 8, 1), np.uint8)
    write_artifact(Path("drawn.safetensors"), {"images": images}, SamplesRecord(protocol={}))
    assert table("drawn.safetensors", "images") == [("drawn", "samples"), ("images", "samples")]


def test_rows_of_one_name_are_told_apart_by_their_paths(run_folder: Path) -> None:
    Path("other").mkdir()
    write_tiny_base(Path("other/base.safetensors"), seed=1)
    names = [name for name, _ in table("base.safetensors", "other/base.safetensors")]
    assert names == ["base.safetensors", "other/base.safetensors"]
    with pytest.raises(ConfigError, match="given twice"):
        table("base.safetensors", "base.safetensors")


def test_what_cannot_be_measured_is_refused(run_folder: Path) -> None:
    with pytest.raises(MissingError, match="nowhere"):
        table("nowhere.safetensors")
    Path("broken.safetensors").write_bytes(b"12")
    with pytest.raises(ArtifactError, match="not a whole safetensors"):
        table("broken.safetensors")
    from deme_cli.artifacts import StatisticsRecord

    record = StatisticsRecord(n=2, extractor={}, resize="none", source="x")
    write_artifact(Path("ref.safetensors"), {"mu": np.zeros(2)}, record)
    with pytest.raises(ArtifactError, match="kind 'statistics' cannot be measured"):
        table("ref.safetensors")
