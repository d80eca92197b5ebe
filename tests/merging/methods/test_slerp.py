"""Slerp of two experts' weights (Shoemake 1985)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from deme_cli.merging.methods import MethodSettings
from deme_cli.merging.methods.angles import arc

SLERP = MethodSettings("slerp")


def shoemake(a: list[float], b: list[float], t: float) -> list[float]:
    """The arc between two flat tensors, element by element; a line where they are colinear."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    sizes = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    if not sizes or abs(dot / sizes) > 0.9995:
        return [(1 - t) * x + t * y for x, y in zip(a, b, strict=True)]
    omega = math.acos(dot / sizes)
    return [
        (math.sin((1 - t) * omega) * x + math.sin(t * omega) * y) / math.sin(omega)
        for x, y in zip(a, b, strict=True)
    ]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1.0), (torch.float32, 0.01), (torch.float64, 1.0), (torch.bfloat16, 1.0)],
)
def test_weights_move_on_the_arc(make_family: Callable, dtype: torch.dtype, scale: float) -> None:
    known, t = make_family(2, dtype, scale=scale), 0.3
    _, found = known.merge([1 - t, t], SLERP)
    flat = [{name: weights[name].double().flatten().tolist() for name in known.names}
            for weights in known.thetas]  # fmt: skip
    known.require_close(
        found, {name: shoemake(flat[0][name], flat[1][name], t) for name in known.names}
    )


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_the_ends_are_the_experts_bit_for_bit(make_family: Callable, scale: float) -> None:
    known = make_family(2, scale=scale)
    fingerprints = [expert.record.fingerprint for expert in known.inputs.experts]
    assert known.merge([1, 0], SLERP)[0].fingerprint == fingerprints[0]
    assert known.merge([0, 1], SLERP)[0].fingerprint == fingerprints[1]


def test_the_arc_keeps_the_length_of_unit_vectors() -> None:
    for cosine in (-0.9, 0.0, 0.5, 0.99):
        for t in (0.0, 0.1, 0.5, 1.0):
            a, b = arc(t, cosine)
            assert a * a + b * b + 2 * a * b * cosine == pytest.approx(1, abs=1e-12)
    assert (arc(0, 0.3), arc(1, 0.3)) == ((1, 0), (0, 1))
