"""Norms, signs and ranks of task vectors: those of whole vectors, streamed, resumed, read out."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_base, write_tiny_expert

from deme_cli.analysis.task_vectors import effective_rank as rank_module
from deme_cli.analysis.task_vectors import measure as walk_module
from deme_cli.analysis.task_vectors import numbers
from deme_cli.analysis.task_vectors.effective_rank import (
    effective_rank,
    gram,
    singular_values,
    stable_rank,
)
from deme_cli.analysis.task_vectors.measure import TaskVectors, layers_of, measure_task_vectors
from deme_cli.analysis.task_vectors.tables import tables
from deme_cli.analysis.unfinished import Step, unfinished_path
from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.errors import ArtifactError, NumericsError, Stopped
from deme_cli.merging.lineage import Family, is_projection, open_family, open_parents
from deme_cli.merging.task_vectors import block_of, measure, write_task_vector

PROJECTION = "channel_projection.mid_block.weight"


def family_in(folder: Path, pattern: str = "ft_*.safetensors") -> Family:
    parents = open_parents(sorted(folder.glob(pattern)), "expert", "task-vector")
    return open_family(folder / "base.safetensors", parents)


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


def finish(family: Family, output: Path, **options) -> TaskVectors:
    *_, last = measure_task_vectors(family, output, **options)
    assert isinstance(last, TaskVectors)
    return last


@pytest.fixture(scope="module")
def found(folder: Path) -> TaskVectors:
    return finish(family_in(folder), folder / "found.json")


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


def test_norms_are_those_of_whole_tensors_relative_to_the_base_or_the_identity(
    folder: Path, found: TaskVectors
) -> None:
    theta, taus = differences(folder)
    assert found.names == ["0:34", "34:67", "67:100"]
    assert {spec.name for spec in found.specs} == set(theta) - {"none"}
    for i, spec in enumerate(found.specs):
        own = [np.linalg.norm(tau[spec.name]) for tau in taus]
        size = np.linalg.norm(theta[spec.name])
        assert numbers.norms(found)[i] == pytest.approx(own, rel=1e-12)
        expected = np.divide(own, size) if size else [math.nan] * 3
        assert numbers.relative_norms(found)[i] == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert "conv_in.bias" in {spec.name for spec in found.specs if not theta[spec.name].any()}
    shown = measure(found.family)
    assert numbers.whole_norms(found)[1] == pytest.approx([n["relative"] for n in shown.norms])
    assert numbers.pairs(found).cosines == pytest.approx(np.array(shown.cosines))
    unmoved = [np.mean(flat(tau) == 0) for tau in taus]
    assert numbers.unmoved(found) == pytest.approx(unmoved)


@pytest.mark.parametrize("block", [None, "down_blocks.0", "channel_projection", "other"])
def test_cosines_and_sign_conflicts_are_those_counted_element_by_element(
    folder: Path, found: TaskVectors, block: str | None
) -> None:
    _, taus = differences(folder)
    vectors = [flat(tau, block) for tau in taus]
    chosen = slice(None) if block is None else numbers.by_block(found)[block]
    shares = numbers.pairs(found, chosen)
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
            assert shares.cosines[x, y] == pytest.approx(vectors[i] @ vectors[j] / sizes)
            assert shares.opposed[x, y] == opposed / both
            assert shares.cancelled[x, y] == pytest.approx(cancelled / overlap)


def test_elements_that_all_experts_moved_the_same_way_are_counted(
    folder: Path, found: TaskVectors
) -> None:
    signs = np.sign([flat(tau) for tau in differences(folder)[1]])
    moved = (signs != 0).all(axis=0)
    assert numbers.same_sign(found) == np.mean(np.abs(signs[:, moved].sum(axis=0)) == 3)


def test_ranks_are_those_of_the_singular_values(folder: Path, found: TaskVectors) -> None:
    theta, taus = differences(folder)
    ranked = 0
    for i, spec in enumerate(found.specs):
        matrices = [one[spec.name].reshape(one[spec.name].shape[0], -1) for one in (theta, *taus)]
        if len(spec.shape) < 2 or min(matrices[0].shape) < 2:
            assert np.isnan(found.effective[i]).all()
            continue
        ranked += 1
        for k, matrix in enumerate(matrices):
            if k == 0 and is_projection(spec.name):
                assert np.isnan(found.effective[i, 0])
                continue
            s = np.linalg.svd(matrix, compute_uv=False)
            p = s[s > 0] / s.sum()
            assert found.effective[i, k] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
            assert found.stable[i, k] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-9)
    assert ranked > 20


@pytest.mark.parametrize("shape", [(30, 4, 3), (7, 40), (12, 12)])
def test_a_matrix_of_known_rank_has_it(shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_module, "PIECE", 50)
    rng = np.random.default_rng(0)
    rows, columns = shape[0], math.prod(shape[1:])
    left, right = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (rows, columns))
    matrix = left @ np.diag([2.0, 2.0, 2.0]) @ right.T
    values = singular_values(gram(lambda a, b: matrix.ravel()[a:b], shape, lambda: None))
    assert values[-3:] == pytest.approx([2, 2, 2])
    assert effective_rank(values) == pytest.approx(3)
    assert stable_rank(values) == pytest.approx(3)
    assert (values[:-3] == 0).all()
    assert math.isnan(effective_rank(np.zeros(3)))
    assert math.isnan(stable_rank(np.zeros(3)))


def test_small_pieces_and_stored_vectors_give_the_same(
    folder: Path, found: TaskVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_in(folder)
    for index in range(3):
        write_task_vector(family, index, {}, folder / f"tv_{index}.safetensors")
    stored = family_in(folder, "tv_*.safetensors")
    monkeypatch.setattr(walk_module, "PIECE", 37)
    monkeypatch.setattr(rank_module, "PIECE", 61)
    for other, near in ((family, 1e-9), (stored, 1e-5)):
        again = finish(other, folder / "again.json", force=True)
        for name, values in found.pairwise.items():
            scale = near * np.abs(values).max()
            assert again.pairwise[name] == pytest.approx(values, rel=near, abs=scale), name
        for name, values in found.once.items():
            assert again.once[name] == pytest.approx(values, rel=1e-9), name
        assert again.effective == pytest.approx(found.effective, rel=1e-4, nan_ok=True)


def test_a_resumed_analysis_equals_an_uninterrupted_one(
    folder: Path, found: TaskVectors, tmp_path: Path
) -> None:
    family, output = family_in(folder), tmp_path / "task-vectors.json"
    steps = measure_task_vectors(family, output)
    for _ in range(4):
        done = next(steps).done
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="after 3 of 145 tensors"):
        next(steps)
    first, *_, before, last = measure_task_vectors(family, output)
    assert first == Step(done, "continuing after 3 of 145 tensors")
    assert before == Step(sum(spec.num_elements for spec in layers_of(family)))
    for name in ("pairwise", "once"):
        for key, values in getattr(found, name).items():
            assert np.array_equal(getattr(last, name)[key], values)
    assert np.array_equal(last.effective, found.effective, equal_nan=True)
    assert np.array_equal(last.stable, found.stable, equal_nan=True)
    first = next(measure_task_vectors(family, output, ranks=False))
    assert (first.done, "another ranks" in first.note) == (0, True)
    anew = measure_task_vectors(family, output, force=True)
    assert next(anew) == Step(0)
    assert not unfinished_path(output).exists()
    anew.close()


def test_orthogonal_vectors_span_as_many_directions_and_equal_ones_span_one() -> None:
    assert numbers.directions(np.eye(4)) == pytest.approx(4)
    assert numbers.directions(np.ones((4, 4))) == pytest.approx(1)
    cosines = np.eye(3)
    cosines[1] = cosines[:, 1] = math.nan  # the second did not move
    assert numbers.directions(cosines) == pytest.approx(2)


def test_ranges_are_compared_on_both_sides_of_half_the_horizon(found: TaskVectors) -> None:
    low, high = numbers.halves(found)  # 34:67 crosses it
    _, relative = numbers.whole_norms(found)
    assert (low, high) == pytest.approx((relative[0], relative[2]))
    assert high > 2 * low  # as the experts were made


def test_what_lies_far_from_an_experts_other_tensors_is_listed(found: TaskVectors) -> None:
    rows = numbers.outliers(found)
    assert {"expert", "tensor", "relative", "of_median"} == set(rows[0])
    names = {spec.name: i for i, spec in enumerate(found.specs)}
    relative = numbers.relative_norms(found)
    for row in rows:
        own = relative[:, found.names.index(row["expert"])]
        logs = np.log(own[np.isfinite(own) & (own > 0)])
        first, third = np.quantile(logs, [0.25, 0.75])
        value = np.log(own[names[row["tensor"]]])
        assert not first - 1.5 * (third - first) <= value <= third + 1.5 * (third - first)


def test_an_expert_that_is_the_base_has_no_cosine(
    finished_run: Path, run_folder: Path, tmp_path: Path
) -> None:
    expert = run_folder / "ft_2of4.safetensors"
    write_artifact(expert, load_tensors(run_folder / "base.safetensors"), read_record(expert))
    last = finish(family_in(run_folder), tmp_path / "x.json", ranks=False)
    every = numbers.pairs(last)
    assert np.isnan(every.cosines[1]).all()
    assert np.isfinite(np.delete(np.delete(every.cosines, 1, 0), 1, 1)).all()
    assert math.isfinite(numbers.mean_of_pairs(every.cosines))
    assert last.effective is None
    assert tables(last)["experts"][1]["unmoved_share"] == 1


@pytest.mark.parametrize("name", ["base", "ft_3of4"])
def test_what_is_not_finite_is_named(run_folder: Path, name: str) -> None:
    family = family_in(run_folder)
    path = run_folder / f"{name}.safetensors"
    begin = family.base.tensors["conv_in.bias"].begin
    if name != "base":
        begin = family.parents[2].header.tensors["conv_in.bias"].begin
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(np.array([np.inf], "<f4").tobytes())
    with pytest.raises(NumericsError, match=rf"{name}.safetensors: 'conv_in.bias' is not finite"):
        finish(family, run_folder / "x.json")


def test_a_dtype_that_cannot_be_subtracted_is_named(run_folder: Path) -> None:
    weights = load_tensors(run_folder / "base.safetensors")
    weights["conv_in.bias"] = weights["conv_in.bias"].to(torch.float8_e5m2)
    base = run_folder / "base.safetensors"
    write_artifact(base, weights, read_record(base))
    expert = run_folder / "ft_1of4.safetensors"
    record = read_record(expert)
    write_artifact(expert, weights, replace(record, base=read_record(base).fingerprint))
    family = open_family(base, open_parents([expert], "expert"))
    with pytest.raises(ArtifactError, match="of F8_E5M2 cannot be subtracted"):
        layers_of(family)
