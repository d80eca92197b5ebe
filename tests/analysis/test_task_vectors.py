"""Norms, signs and ranks of task vectors: those of whole vectors, streamed, resumed, read out."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny_base, write_tiny_expert

from deme_cli.analysis import task_vectors as module
from deme_cli.analysis.settings import TaskVectorConfig
from deme_cli.analysis.task_vectors import (
    analyze_task_vectors,
    directions,
    effective_rank,
    gram,
    singular_values,
)
from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.files import read_header
from deme_cli.merging.inputs import is_projection, open_experts, open_inputs
from deme_cli.merging.task_vectors import block_of, measure, write_task_vector

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
        matrix = torch.eye(16) + 0.1 * torch.randn(16, 16, generator=generator)
        moved[PROJECTION] = matrix
        if index == 1:
            moved["conv_out.weight"] = weights["conv_out.weight"]
        keep = torch.rand(moved["conv_in.weight"].shape, generator=generator) < 0.5
        moved["conv_in.weight"] = torch.where(
            keep, moved["conv_in.weight"], weights["conv_in.weight"]
        )
        write_artifact(path, moved, expert)
    return place


def analyze(folder: Path, output: Path, pattern: str = "ft_*.safetensors", **options: Any) -> Any:
    """The document, its lists as arrays."""
    made = analyze_task_vectors(sorted(folder.glob(pattern)), output=output, **options)
    return made.document


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return analyze(folder, folder / "found.json")


def differences(folder: Path) -> tuple[dict, list[dict]]:
    """theta and the tau_i in float64, by name, experts in order of their ranges."""
    base = {n: t.double().numpy() for n, t in load_tensors(folder / "base.safetensors").items()}
    full = {**base, PROJECTION: np.eye(16)}
    experts = [load_tensors(folder / f"ft_{name}.safetensors") for name in "cba"]
    return full, [{n: t.double().numpy() - full[n] for n, t in one.items()} for one in experts]


def flat(tau: dict, block: str | None = None) -> np.ndarray:
    return np.concatenate(
        [tau[n].ravel() for n in sorted(tau) if block is None or block_of(n) == block]
    )


def known(values: list[float | None]) -> np.ndarray:
    """nan where nothing is known."""
    return np.array(values, float)


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
        assert known(row["relative_norms"]) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert not theta["conv_in.bias"].any()
    paths = sorted(folder.glob("ft_*.safetensors"), reverse=True)
    norms, cosines = measure(
        open_inputs(folder / "base.safetensors", open_experts(paths, "expert"))
    )
    relative = [row["relative_norm"] for row in found["experts"]]
    assert relative == pytest.approx([one["relative"] for one in norms])
    assert np.array(found["pairs"]["cosines"]) == pytest.approx(np.array(cosines))
    unmoved = [np.mean(flat(tau) == 0) for tau in taus]
    assert [row["unmoved_share"] for row in found["experts"]] == pytest.approx(unmoved)
    halves = found["relative_norm"]  # 34:67 crosses half the horizon
    assert (halves["below_half"], halves["from_half"]) == pytest.approx((relative[0], relative[2]))
    assert halves["ratio"] > 2  # as the experts were made


@pytest.mark.parametrize("block", [None, "down_blocks.0", "channel_projection", "other"])
def test_cosines_and_sign_conflicts_are_those_counted_element_by_element(
    folder: Path, found: dict[str, Any], block: str | None
) -> None:
    _, taus = differences(folder)
    vectors = [flat(tau, block) for tau in taus]
    by_block = {row["name"]: row for row in found["blocks"]}
    shares = found["pairs"] if block is None else by_block[block]
    for i, j in combinations(range(3), 2):
        both = opposed = 0
        overlap = cancelled = 0.0
        for a, b in zip(vectors[i].tolist(), vectors[j].tolist(), strict=True):
            differ = a * b < 0
            both += a != 0 and b != 0
            opposed += differ
            overlap += min(abs(a), abs(b))
            cancelled += min(abs(a), abs(b)) if differ else 0
        sizes = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
        for x, y in ((i, j), (j, i)):
            assert shares["cosines"][x][y] == pytest.approx(vectors[i] @ vectors[j] / sizes)
            assert shares["sign_conflicts"][x][y] == opposed / both
            near = pytest.approx(cancelled / overlap)
            assert shares["sign_conflicts_by_magnitude"][x][y] == near
    signs = np.sign([flat(tau) for tau in taus])
    moved = (signs != 0).all(axis=0)
    same = np.mean(np.abs(signs[:, moved].sum(axis=0)) == 3)
    assert found["pairs"]["same_sign_in_all"] == same


def test_ranks_are_those_of_the_singular_values(folder: Path, found: dict[str, Any]) -> None:
    theta, taus = differences(folder)
    ranked = 0
    for row in found["tensors"]:
        name, ranks = row["name"], known([row["base_effective_rank"], *row["effective_ranks"]])
        matrices = [one[name].reshape(one[name].shape[0], -1) for one in (theta, *taus)]
        if len(row["shape"]) < 2 or min(matrices[0].shape) < 2:
            assert np.isnan(ranks).all()
            continue
        ranked += 1
        for k, matrix in enumerate(matrices):
            s = np.linalg.svd(matrix, compute_uv=False)
            p = s[s > 0] / s.sum()
            expected = float(np.exp(-(p * np.log(p)).sum())) if s.any() else math.nan
            expected = math.nan if k == 0 and is_projection(name) else expected
            assert ranks[k] == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert ranked > 20


@pytest.mark.parametrize("shape", [(30, 4, 3), (7, 40), (12, 12)])
def test_a_matrix_of_known_rank_has_it(shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 50)
    rng = np.random.default_rng(0)
    rows, columns = shape[0], math.prod(shape[1:])
    left, right = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (rows, columns))
    matrix = left @ np.diag([2.0, 2.0, 2.0]) @ right.T
    values = singular_values(gram(lambda a, b: matrix.ravel()[a:b], shape, lambda: None))
    assert values[-3:] == pytest.approx([2, 2, 2])
    assert effective_rank(values) == pytest.approx(3)
    assert (values[:-3] == 0).all()
    assert math.isnan(effective_rank(np.zeros(3)))


def test_small_pieces_stored_vectors_and_a_stop_give_the_same(
    folder: Path, found: dict[str, Any], resumed: Any, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    parents = open_experts(sorted(folder.glob("ft_*.safetensors")), "expert")
    family = open_inputs(folder / "base.safetensors", parents)
    for index in range(3):
        write_task_vector(family, index, {}, tmp_path / f"tv_{index}.safetensors")
    experts = sorted(folder.glob("ft_*.safetensors"))
    call = partial(analyze_task_vectors, experts, output=tmp_path / "resumed.json")
    assert resumed(call, 100).document == found
    base = folder / "base.safetensors"
    stored = analyze(tmp_path, tmp_path / "stored.json", "tv_*.safetensors", base=base)
    monkeypatch.setattr(module, "PIECE", 37)
    pieces = analyze(folder, tmp_path / "pieces.json")
    for other, near in ((pieces, 1e-9), (stored, 1e-4)):
        for row, expected in zip(other["tensors"], found["tensors"], strict=True):
            assert row["norms"] == pytest.approx(expected["norms"], rel=near, abs=near)
            ranks = pytest.approx(known(expected["effective_ranks"]), rel=1e-4, nan_ok=True)
            assert known(row["effective_ranks"]) == ranks
        for name in ("cosines", "sign_conflicts"):
            near_pairs = pytest.approx(np.array(found["pairs"][name]), rel=near, abs=near)
            assert np.array(other["pairs"][name]) == near_pairs


def test_orthogonal_vectors_span_as_many_directions_and_equal_ones_span_one() -> None:
    assert directions(np.eye(4)) == pytest.approx(4)
    assert directions(np.ones((4, 4))) == pytest.approx(1)
    cosines = np.eye(3)
    cosines[1] = cosines[:, 1] = math.nan  # the second did not move
    assert directions(cosines) == pytest.approx(2)


def test_an_expert_that_is_the_base_has_no_cosine(run_folder: Path) -> None:
    expert = run_folder / "ft_2of4.safetensors"
    write_artifact(expert, load_tensors(run_folder / "base.safetensors"), read_record(expert))
    document = analyze(run_folder, run_folder / "x.json", settings=TaskVectorConfig(ranks=False))
    cosines = np.array(document["pairs"]["cosines"], float)
    assert np.isnan(cosines[1]).all()
    assert np.isfinite(np.delete(np.delete(cosines, 1, 0), 1, 1)).all()
    assert math.isfinite(document["pairs"]["mean_cosine"])
    assert document["pairs"]["directions"] == pytest.approx(3, abs=0.01)
    assert document["experts"][1]["unmoved_share"] == 1
    assert document["experts"][1]["median_relative_rank"] is None
    assert "nan" not in document["reading"]


@pytest.mark.parametrize("name", ["base", "ft_3of4"])
def test_what_is_not_finite_is_named(run_folder: Path, name: str) -> None:
    path = run_folder / f"{name}.safetensors"
    with path.open("r+b") as file:
        file.seek(read_header(path).tensors["conv_in.bias"].begin)
        file.write(np.array([np.inf], "<f4").tobytes())
    with pytest.raises(NumericsError, match=rf"{name}.safetensors: 'conv_in.bias' is not finite"):
        analyze(run_folder, run_folder / "x.json")


def test_a_dtype_that_cannot_be_subtracted_is_named(run_folder: Path) -> None:
    weights = load_tensors(run_folder / "base.safetensors")
    weights["conv_in.bias"] = weights["conv_in.bias"].to(torch.float8_e5m2)
    base = run_folder / "base.safetensors"
    write_artifact(base, weights, read_record(base))
    expert = run_folder / "ft_1of4.safetensors"
    record = read_record(expert)
    write_artifact(expert, weights, replace(record, base=read_record(base).fingerprint))
    with pytest.raises(ArtifactError, match="of F8_E5M2 cannot be subtracted"):
        analyze(run_folder, run_folder / "x.json", "ft_1of4.safetensors")
