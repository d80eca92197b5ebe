"""Norms and signs of task vectors: those of whole vectors, streamed, read out."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny_base, write_tiny_expert

from deme_cli.analysis import task_vectors as module
from deme_cli.analysis.task_vectors import analyze_task_vectors
from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.files import read_header
from deme_cli.merging.inputs import open_experts, open_inputs
from deme_cli.merging.task_vectors import measure, write_task_vector

PROJECTION = "channel_projection.mid_block.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts, given out of order, with a projection, bfloat16-like zeros and a zero layer.

    conv_in.bias is 0 in the base; the first expert leaves conv_out.weight as it was.
    """
    place = tmp_path_factory.mktemp("family")
    base = place / "base.safetensors"
    write_tiny_base(base)
    weights, record = load_tensors(base), read_record(base)
    weights["conv_in.bias"].zero_()
    weights["none"] = torch.zeros(0, 3)
    record = write_artifact(base, weights, record)
    generator = torch.Generator().manual_seed(0)
    for index, name in ((1, "c"), (2, "b"), (3, "a")):
        path = place / f"ft_{name}.safetensors"
        write_tiny_expert(path, base, index=index, of=3, scale=0.02 * index)
        moved, expert = load_tensors(path), read_record(path)
        moved[PROJECTION] = torch.eye(16) + 0.1 * torch.randn(16, 16, generator=generator)
        if index == 1:
            moved["conv_out.weight"] = weights["conv_out.weight"]
        keep = torch.rand(moved["conv_in.weight"].shape, generator=generator) < 0.5
        moved["conv_in.weight"] = torch.where(
            keep, moved["conv_in.weight"], weights["conv_in.weight"]
        )
        write_artifact(path, moved, expert)
    return place


def analyze(folder: Path, output: Path, pattern: str = "ft_*.safetensors", **options: Any) -> Any:
    return analyze_task_vectors(sorted(folder.glob(pattern)), output=output, **options).document


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return analyze(folder, folder / "found.json")


def differences(folder: Path) -> tuple[dict, list[dict]]:
    """theta and the tau_i in float64, by name, experts in order of their ranges."""
    base = {n: t.double().numpy() for n, t in load_tensors(folder / "base.safetensors").items()}
    full = {**base, PROJECTION: np.eye(16)}
    experts = [load_tensors(folder / f"ft_{name}.safetensors") for name in "cba"]
    return full, [{n: t.double().numpy() - full[n] for n, t in one.items()} for one in experts]


def test_norms_are_those_of_whole_tensors_relative_to_the_base_or_the_identity(
    folder: Path, found: dict[str, Any]
) -> None:
    theta, taus = differences(folder)
    rows = {row["name"]: row for row in found["tensors"]}
    assert [row["name"] for row in found["experts"]] == ["0:34", "34:67", "67:100"]
    assert set(rows) == set(theta) - {"none"}
    for name, row in rows.items():
        own, size = [np.linalg.norm(tau[name]) for tau in taus], np.linalg.norm(theta[name])
        assert row["norms"] == pytest.approx(own, rel=1e-12)
        expected = np.array(own) / size if size else np.full(3, np.nan)
        relative = np.array(row["relative_norms"], float)
        assert relative == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert not theta["conv_in.bias"].any()
    paths = sorted(folder.glob("ft_*.safetensors"), reverse=True)
    norms, _ = measure(open_inputs(folder / "base.safetensors", open_experts(paths, "expert")))
    relative = [row["relative_norm"] for row in found["experts"]]
    assert relative == pytest.approx([one["relative"] for one in norms])


def test_cosines_and_sign_conflicts_are_those_counted_element_by_element(
    folder: Path, found: dict[str, Any]
) -> None:
    _, taus = differences(folder)
    vectors = [np.concatenate([tau[name].ravel() for name in sorted(tau)]) for tau in taus]
    shares = found["pairs"]
    for i, j in combinations(range(3), 2):
        both = opposed = 0
        for a, b in zip(vectors[i].tolist(), vectors[j].tolist(), strict=True):
            both += a != 0 and b != 0
            opposed += a * b < 0
        sizes = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
        for x, y in ((i, j), (j, i)):
            assert shares["cosines"][x][y] == pytest.approx(vectors[i] @ vectors[j] / sizes)
            assert shares["sign_conflicts"][x][y] == opposed / both


def test_small_pieces_and_stored_vectors_give_the_same(
    folder: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, experts = folder / "base.safetensors", sorted(folder.glob("ft_*.safetensors"))
    inputs = open_inputs(base, open_experts(experts, "expert"))
    for index in range(3):
        write_task_vector(inputs, index, {}, tmp_path / f"tv_{index}.safetensors")
    monkeypatch.setattr(module, "PIECE", 37)
    stored = analyze(tmp_path, tmp_path / "stored.json", "tv_*.safetensors", base=base)
    for row, expected in zip(stored["tensors"], found["tensors"], strict=True):
        assert row["norms"] == pytest.approx(expected["norms"], rel=1e-4, abs=1e-4)
    for name in ("cosines", "sign_conflicts"):
        near = pytest.approx(np.array(found["pairs"][name]), rel=1e-4, abs=1e-4)
        assert np.array(stored["pairs"][name]) == near


def test_an_expert_that_is_the_base_has_no_cosine(run_folder: Path) -> None:
    expert = run_folder / "ft_2of4.safetensors"
    write_artifact(expert, load_tensors(run_folder / "base.safetensors"), read_record(expert))
    document = analyze(run_folder, run_folder / "x.json")
    cosines = np.array(document["pairs"]["cosines"], float)
    assert np.isnan(cosines).sum() == np.isnan(cosines[1]).sum() + np.isnan(cosines[:, 1]).sum() - 1
    assert np.isfinite(document["pairs"]["mean_cosine"])
    assert "nan" not in document["reading"]


def test_what_is_not_finite_or_cannot_be_subtracted_is_named(run_folder: Path) -> None:
    base, expert = run_folder / "base.safetensors", run_folder / "ft_1of4.safetensors"
    for path in (run_folder / "ft_3of4.safetensors", base):
        with path.open("r+b") as file:
            file.seek(read_header(path).tensors["conv_in.bias"].begin)
            file.write(np.array([np.inf], "<f4").tobytes())
        told = rf"{path.name}: 'conv_in.bias' is not finite"
        with pytest.raises(NumericsError, match=told):
            analyze(run_folder, run_folder / "x.json")
    weights = load_tensors(base)
    weights["conv_in.bias"] = weights["conv_in.bias"].to(torch.float8_e5m2)
    fingerprint = write_artifact(base, weights, read_record(base)).fingerprint
    write_artifact(expert, weights, replace(read_record(expert), base=fingerprint))
    with pytest.raises(ArtifactError, match="of F8_E5M2 cannot be subtracted"):
        analyze(run_folder, run_folder / "x.json", "ft_1of4.safetensors")
