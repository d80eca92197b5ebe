"""No method depends on how tensors are cut into pieces, nor on the coefficients of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deme_cli.merging import combine, tensor_stream
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.methods import METHODS, MethodSettings, sparsify


@pytest.mark.parametrize("name", METHODS)
def test_small_pieces_give_the_same_merge(
    make_family: Callable, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    known, method = make_family(2), MethodSettings(name, density=0.4)
    w = None if name == "model-stock" else [0.25, 0.75]
    _, whole = known.merge(w, method)
    for module in (combine, sparsify, tensor_stream):
        monkeypatch.setattr(module, "PIECE", 7)
    monkeypatch.setattr(combine, "BLOCK", 21)
    _, cut = known.merge(w, method)
    known.require_close(cut, {name: whole[name].flatten().tolist() for name in known.names})
    if name in ("linear", "ties", "dare"):  # the others sum over pieces
        assert all((cut[name] == whole[name]).all() for name in known.names)


@pytest.mark.parametrize("name", ["linear", "ties", "slerp"])
def test_coefficients_by_glob_are_those_merged_tensor_by_tensor(
    make_family: Callable, name: str
) -> None:
    known, method = make_family(2), MethodSettings(name, density=0.6)
    by_glob = {"conv.weight": (0.9, 0.1), "conv.*": (0.25, 0.75), "channel_*": (0.0, 1.0)}
    record, found = known.merge(Coefficients((0.5, 0.5), by_glob), method)
    for tensor in known.names:
        w = {"conv.weight": (0.9, 0.1), "conv.bias": (0.25, 0.75)}.get(tensor, (0.5, 0.5))
        w = (0.0, 1.0) if tensor.startswith("channel_") else w
        alone = known.merge(w, method)[1][tensor]
        assert (found[tensor] == alone).all(), tensor
    assert record.coefficients == [0.5, 0.5]
    assert record.coefficients_for == {glob: list(values) for glob, values in by_glob.items()}


@pytest.mark.parametrize("name", METHODS)
def test_stored_vectors_stand_for_their_experts(
    make_family: Callable, as_vectors: Callable, name: str
) -> None:
    known, method = make_family(2, scale=1.0), MethodSettings(name, density=0.5, seed=1)
    w = None if name == "model-stock" else [0.4, 0.6]
    record, found = known.merge(w, method)
    vectors, others = as_vectors(known).merge(w, method)
    if name in ("ties", "dare"):
        assert vectors.fingerprint == record.fingerprint
    for tensor in known.names:
        torch.testing.assert_close(others[tensor], found[tensor], rtol=1e-5, atol=1e-5)
