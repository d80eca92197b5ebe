"""DARE: what is dropped, what is left, and what it depends on (Yu et al. 2024)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from deme_cli.merging.methods import MethodSettings
from deme_cli.merging.methods.sparsify import keeps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_merge_drops_and_rescales_element_by_element(
    make_family: Callable, taus_of: Callable, dtype: torch.dtype
) -> None:
    known, w, density = make_family(3, dtype), [0.5, -0.2, 0.3], 0.6
    record, found = known.merge(w, MethodSettings("dare", density=density, seed=4))
    taus, expected = taus_of(known), {}
    for name in known.names:
        expected[name] = known.theta[name].double().flatten().tolist()
        for c, tau, expert in zip(w, taus, known.inputs.experts, strict=True):
            told = {"seed": 4, "expert": expert.fingerprint, "name": name, "density": density}
            mask = keeps(0, len(tau[name]), **told)
            for place, x in enumerate(tau[name]):
                expected[name][place] += c * (x / density if mask[place] else 0.0)
    known.require_close(found, expected)
    assert (record.method, record.settings) == ("dare", {"density": density, "seed": 4})


def test_density_1_is_the_linear_merge_bit_for_bit(make_family: Callable) -> None:
    known = make_family(3)
    linear, _ = known.merge([0.5, -0.2, 0.3], MethodSettings())
    dare, _ = known.merge([0.5, -0.2, 0.3], MethodSettings("dare", density=1.0))
    assert dare.fingerprint == linear.fingerprint


def test_masks_have_the_density_and_depend_on_seed_expert_and_tensor_alone() -> None:
    whole = keeps(0, 100_000, seed=0, expert="a", name="w", density=0.3)
    assert whole.mean() == pytest.approx(0.3, abs=5 * (0.21 / 1e5) ** 0.5)
    for start, count in ((0, 1), (1, 7), (5, 8), (8, 8), (9, 1000), (99_999, 1), (77, 0)):
        part = keeps(start, count, seed=0, expert="a", name="w", density=0.3)
        assert np.array_equal(part, whole[start : start + count])
    for other in ({"seed": 1}, {"expert": "b"}, {"name": "v"}):
        settings = {"seed": 0, "expert": "a", "name": "w", **other}
        mask = keeps(0, 100_000, density=0.3, **settings)
        assert (mask & whole).mean() == pytest.approx(0.09, abs=0.005)
    key = np.frombuffer(hashlib.sha256(b"0\0a\0w").digest()[:16], "<u8")
    words = np.random.Philox(key=key).random_raw(50_000).astype("<u8").view("<u4")
    assert np.array_equal(whole, words < 0.3 * 2**32), "element e takes the e-th word"
    denser = keeps(0, 100_000, seed=0, expert="a", name="w", density=0.5)
    assert (denser | ~whole).all()  # a larger density only adds elements
