"""Model Stock against Eq. 7 of Jang et al. 2024, tensor by tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.inputs import open_experts, open_inputs
from deme_cli.merging.methods import MethodSettings
from deme_cli.merging.methods.angles import ratio

STOCK = MethodSettings("model-stock")


def cosine(a: list[float], b: list[float]) -> float:
    size = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / size if size else 0.0


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 2), (torch.float32, 4), (torch.float64, 2), (torch.bfloat16, 2)],
)
def test_each_tensor_follows_its_own_angle(
    make_family: Callable, taus_of: Callable, dtype: torch.dtype, count: int
) -> None:
    known = make_family(count, dtype)
    record, found = known.merge(None, STOCK)
    taus, expected, ratios = taus_of(known), {}, {}
    for name in known.names:
        own = [tau[name] for tau in taus]
        cos = sum(itertools.starmap(cosine, itertools.combinations(own, 2)))
        cos /= count * (count - 1) / 2
        t = max(0.0, count * cos / (1 + (count - 1) * cos)) if cos > 0 else 0.0
        ratios[name] = t
        theta = known.theta[name].double().flatten().tolist()
        thetas = [weights[name].double().flatten().tolist() for weights in known.thetas]
        expected[name] = [
            t * sum(weights[place] for weights in thetas) / count + (1 - t) * x
            for place, x in enumerate(theta)
        ]
    assert any(0 < t < 1 for t in ratios.values())
    known.require_close(found, expected)
    sizes = {name: known.theta[name].numel() for name in known.names}
    mean = sum(ratios[n] * sizes[n] for n in sizes) / sum(sizes.values()) / count
    assert record.coefficients == [pytest.approx(mean, rel=1e-6)] * count
    assert (record.method, record.coefficients_for, record.settings) == ("model-stock", {}, {})


def test_equal_experts_are_kept_and_experts_that_did_not_move_give_the_base(
    write_inputs: Callable, weights: Callable, tmp_path
) -> None:
    output = tmp_path / "merged.safetensors"
    for experts, expected in ((weights(1), weights(1)), (weights(0), weights(0))):
        base, paths = write_inputs(weights(0), [experts] * 2)
        inputs = open_inputs(base, open_experts(paths, "expert"))
        record = merge_inputs(inputs, None, output, method=STOCK)
        wanted = merge_inputs(replace(inputs, experts=inputs.experts[:1]), [1.0], output)
        assert record.fingerprint == wanted.fingerprint
        assert expected.keys() == experts.keys()


def test_t_grows_with_the_cosine_and_is_0_without_agreement() -> None:
    def gram(cos: float, count: int) -> np.ndarray:
        return np.full((count, count), cos) + (1 - cos) * np.eye(count)

    assert ratio(gram(1.0, 3)) == pytest.approx(1)
    assert ratio(gram(0.5, 2)) == pytest.approx(2 * 0.5 / 1.5)
    assert ratio(4 * gram(0.5, 2)) == pytest.approx(2 * 0.5 / 1.5)
    assert ratio(gram(0.0, 3)) == ratio(gram(-0.4, 3)) == ratio(gram(-1.0, 2)) == 0
    assert ratio(np.zeros((3, 3))) == 0
    assert ratio(np.diag([1.0, 0.0])) == 0  # a vector of zeros counts as orthogonal
