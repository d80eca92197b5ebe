"""TIES against Algorithm 1 of Yadav et al. 2023, element by element."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from deme_cli.errors import NumericsError
from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.inputs import open_experts, open_inputs
from deme_cli.merging.methods import MethodSettings
from deme_cli.merging.methods.sparsify import kth_largest

TIES = MethodSettings("ties")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def trimmed(tau: dict[str, list[float]], density: float, trim: str) -> dict[str, list[float]]:
    """The `density` share of largest magnitude, of everything or of each tensor."""
    groups = [list(tau)] if trim == "model" else [[name] for name in tau]
    kept = {}
    for names in groups:
        sizes = sorted((abs(x) for name in names for x in tau[name]), reverse=True)
        if not sizes:
            kept |= {name: [] for name in names}
            continue
        threshold = sizes[max(1, int(density * len(sizes))) - 1]
        for name in names:
            kept[name] = [x if abs(x) >= threshold else 0.0 for x in tau[name]]
    return kept


def algorithm_1(theta: list[float], taus: list[list[float]], scale: float) -> list[float]:
    """theta + scale * the mean of what agrees with the sign of the sum, for one tensor."""
    merged = []
    for place, x in enumerate(theta):
        values = [tau[place] for tau in taus]
        gamma = sign(sum(values))
        agreeing = [v for v in values if gamma and sign(v) == gamma]
        merged.append(x + scale * (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    return merged


@pytest.mark.parametrize(
    ("dtype", "trim", "density"),
    [
        *((torch.float32, "model", density) for density in (0.2, 0.7, 1.0)),
        *((dtype, "tensor", 0.7) for dtype in DTYPES),
    ],
)
def test_equal_coefficients_give_the_published_algorithm(
    make_family: Callable, taus_of: Callable, dtype: torch.dtype, trim: str, density: float
) -> None:
    known, scale = make_family(3, dtype), 0.9
    record, found = known.merge([scale / 3] * 3, MethodSettings("ties", density=density, trim=trim))
    taus = [trimmed(tau, density, trim) for tau in taus_of(known)]
    known.require_close(found, {
        name: algorithm_1(
            known.theta[name].double().flatten().tolist(), [tau[name] for tau in taus], scale
        )
        for name in known.names
    })  # fmt: skip
    assert record.method == "ties"
    assert record.settings == {"density": density, "trim": trim}


def test_other_coefficients_scale_what_each_expert_adds(
    make_family: Callable, taus_of: Callable
) -> None:
    known, w = make_family(3), [0.5, -0.2, 0.1]
    _, found = known.merge(w, MethodSettings("ties", density=0.5, trim="tensor"))
    taus, expected = [trimmed(tau, 0.5, "tensor") for tau in taus_of(known)], {}
    for name in known.names:
        expected[name] = []
        for place, x in enumerate(known.theta[name].double().flatten().tolist()):
            values = [tau[name][place] for tau in taus]
            gamma = sign(sum(values))
            agree = [gamma != 0 and sign(v) == gamma for v in values]
            added = sum(
                c * 3 * v / sum(agree) for c, v, a in zip(w, values, agree, strict=True) if a
            )
            expected[name].append(x + added)
    known.require_close(found, expected)


def test_one_expert_whole_is_that_expert_bit_for_bit(make_family: Callable) -> None:
    known = make_family(1)
    record, _ = known.merge([1.0], MethodSettings("ties", density=1.0))
    assert record.fingerprint == known.inputs.experts[0].record.fingerprint
    record, _ = make_family(3).merge([0, 0, 0], TIES)
    assert record.fingerprint == known.inputs.base_record.fingerprint


@pytest.mark.parametrize("share", [1e-9, 0.3, 0.999, 1.0])
def test_thresholds_are_the_sorted_ones(share: float) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3, 5000)) * 10.0 ** rng.integers(-40, 30, (3, 5000))
    vectors[1, :4000] = 0
    vectors[2] = np.round(vectors[2] % 3)  # many of one magnitude
    vectors = vectors.astype(np.float32)
    pieces = np.split(vectors, [1, 700, 701, 4000], axis=1)
    found, are_finite = kth_largest(lambda: iter(pieces), 3, share)
    expected = np.sort(np.abs(vectors))[:, ::-1][:, max(1, int(share * 5000)) - 1]
    assert np.array_equal(found, expected)
    assert are_finite.all()
    vectors[0, 5], vectors[2, 0] = np.nan, -np.inf
    assert kth_largest(lambda: iter(pieces), 3, share)[1].tolist() == [False, True, False]


def test_an_expert_that_is_not_finite_is_named(
    write_inputs: Callable, weights: Callable, tmp_path: Path
) -> None:
    spoilt = {**weights(2), "conv.bias": torch.full((17,), float("nan"))}
    base, paths = write_inputs(weights(0), [weights(1), spoilt])
    inputs = open_inputs(base, open_experts(paths, "expert"))
    with pytest.raises(NumericsError, match=r"ft_2of2.*not finite"):
        merge_inputs(inputs, [0.5, 0.5], tmp_path / "merged.safetensors", method=TIES)
    assert not (tmp_path / "merged.safetensors").exists()
