"""Pictures of searches: that there is one of any search, and what decides what it shows."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import numpy as np
import pytest

from deme_cli.errors import NumericsError
from deme_cli.merging.show_search import best_of, draw_search, highest_shown
from deme_cli.merging.space import Trial


def trials_of(values, points, *, stage: int = 0, first: int = 0, names=("base", "1/N each")):
    return [
        Trial(first + i, stage, tuple(point), value, names[i] if i < len(names) else "")
        for i, (value, point) in enumerate(zip(values, points, strict=True))
    ]


def search(count: int, dimensions: int) -> list[Trial]:
    random = np.random.default_rng(dimensions)
    points = random.uniform(-1, 1, (count, dimensions))
    return trials_of([1.0 + float((p**2).sum()) for p in points], points)


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height, which a PNG names first."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize("dimensions", [1, 4, 40])
def test_any_number_of_coefficients_makes_a_picture(dimensions: int) -> None:
    labels = [f"1of1 down_blocks.{i}.attentions.0.to_q.*" for i in range(dimensions)]
    trials = search(12, dimensions)
    later = [replace(t, index=12 + t.index, stage=1) for t in trials[:5]]
    for shown in (trials, [*trials, *later], trials[:1]):
        width, height = size_of(draw_search(shown, labels, ["loss", "fid"]))
        assert 800 < width < 3000
        assert 500 < height < 1000


def test_a_search_that_is_mostly_broken_still_makes_a_picture() -> None:
    points = np.linspace(0, 1, 6)[:, None]
    for survivor in (0, 3):
        values = [2.0 if i == survivor else math.inf for i in range(6)]
        size_of(draw_search(trials_of(values, points, names=()), ["1of1"], ["fid"]))
    with pytest.raises(NumericsError, match="not finite for any candidate"):
        draw_search(trials_of([math.inf] * 6, points), ["1of1"], ["fid"])


def test_the_best_is_that_of_the_highest_finite_rung() -> None:
    low, high = search(6, 2), [Trial(6, 1, (0.0, 1.0), 50.0)]
    broken = [Trial(7, 2, (0.0, 1.0), math.inf)]
    assert best_of([*low, *high, *broken]) is high[0]
    assert best_of(low) is min(low, key=lambda trial: trial.objective)


def test_values_far_off_do_not_flatten_the_picture() -> None:
    assert highest_shown([1.0, 1.1, 1.2, 1.3, 1.4, 1e6]) == 1.4
    assert highest_shown([5.0, math.inf]) == 5.0
