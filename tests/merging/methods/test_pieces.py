"""No method depends on how tensors are cut into pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deme_cli.merging import combine, tensor_stream
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
