"""Pictures of searches: that there is one of any search, and what decides what it shows."""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np
import pytest

from deme_cli.errors import NumericsError
from deme_cli.merging.search.figure import draw_search, least_over_others
from deme_cli.merging.search.grid import grid_points
from deme_cli.merging.search.heat_map import draw_heat_map, group_name, network_order, shorten
from deme_cli.merging.search.trials import Trial
from deme_cli.merging.search.trials_figure import best_of, draw_trials, window

GRID = ((0.0, 0.5, 1.0), (0.0, 1.0))
POINTS = [(0.0, 0.0), (0.5, 0.5), *grid_points(GRID)[1:]]  # the base and the mean come first


def trials_of(values, points, *, rung: int = 0, first: int = 0, names=("base", "1/N each")):
    bests = itertools.accumulate(values, min)
    return [
        Trial(first + i, tuple(point), value, best, rung, 1.0, names[i] if i < len(names) else "")
        for i, (value, point, best) in enumerate(zip(values, points, bests, strict=True))
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
    importances = {label: 1 / (1 + i) for i, label in enumerate(labels)}
    for known in (None, importances):
        width, height = size_of(draw_trials(trials, labels, objectives=["fid"], importances=known))
        assert 800 < width < 3000
        assert 500 < height < 2500


def test_a_search_that_is_mostly_broken_still_makes_a_picture() -> None:
    points = np.linspace(0, 1, 6)[:, None]
    for survivor in (0, 3):
        values = [2.0 if i == survivor else math.inf for i in range(6)]
        trials = trials_of(values, points, names=())
        size_of(draw_trials(trials, ["1of1"], objectives=["fid"]))
    with pytest.raises(NumericsError, match="not finite for any candidate"):
        draw_trials(trials_of([math.inf] * 6, points), ["1of1"], objectives=["fid"])


def test_one_trial_makes_a_picture() -> None:
    size_of(draw_trials(trials_of([3.0], [(0.1, 0.2)]), ["1of2", "2of2"], objectives=["loss"]))


def test_every_rung_makes_the_picture_taller() -> None:
    low = search(12, 2)
    high = [
        Trial(12 + i, t.point, 2 * t.objective, 2.0, 1, 1.0, t.name) for i, t in enumerate(low[:5])
    ]
    apart = [Trial(20, (0.3, 0.3), -0.1, -0.1, 2)]
    labels = ["1of2", "2of2"]
    one = draw_trials(low, labels, objectives=["loss"])
    two = draw_trials([*low, *high], labels, objectives=["loss", "kid"], rhos=[0.5])
    three = draw_trials([*low, *high, *apart], labels, objectives=["loss", "kid", "fid"])
    assert size_of(one)[1] < size_of(two)[1] < size_of(three)[1]


def test_the_best_is_that_of_the_highest_finite_rung() -> None:
    low, high = search(6, 2), [Trial(6, (0.0, 1.0), 50.0, 50.0, 1)]
    broken = [Trial(7, (0.0, 1.0), math.inf, math.inf, 2)]
    assert best_of([*low, *high, *broken]) is high[0]
    assert best_of(low) is min(low, key=lambda trial: trial.objective)


def test_values_far_off_do_not_flatten_the_picture() -> None:
    values = [1.0, 1.1, 1.2, 1.3, 1.4, 1e6]
    assert window(values, []) == (1.0, 1.4)
    assert window(values, [2.0, math.inf]) == (1.0, 2.0), "a base that is near is shown"
    assert window(values, [90.0]) == (1.0, 1.4), "one that is far is not"
    assert window([5.0, math.inf], []) == (5.0, 5.0)
    assert window([-1.0, 0.0, 1.0], []) == (-1.0, 1.0)


def test_the_map_holds_the_least_over_the_other_coefficients() -> None:
    values = [math.inf if p == (0.5, 1.0) else sum(p) + 1 for p in POINTS]
    least = least_over_others(trials_of(values, POINTS), GRID, 0, 1)
    np.testing.assert_allclose(least, [[1, 2], [1.5, math.nan], [2, 3]])
    diagonal = least_over_others(trials_of(values, POINTS), GRID, 0, 0)
    np.testing.assert_allclose(np.diag(diagonal), [1, 1.5, 2])


@pytest.mark.parametrize("names", [(), ("base",), ("base", "1/N each")])
def test_a_grid_is_drawn_with_and_without_references(names: tuple[str, ...]) -> None:
    trials = trials_of([sum(p) + 1 for p in POINTS], POINTS, names=names)
    size_of(draw_search(trials, GRID, ["1of2", "2of2"], objective="fid"))
    size_of(draw_search(trials[::-1], GRID, ["1of2", "2of2"], objective="fid"))


def test_a_grid_of_one_expert_is_a_curve() -> None:
    trials = trials_of([1.0, 2.0, 3.0], [(0.0,), (1.0,), (0.5,)])
    size_of(draw_search(trials, ((0.0, 0.5),), ["1of1"], objective="fid"))


@pytest.mark.parametrize("count", [1, 10, 130])
def test_coefficients_of_any_number_of_groups_make_a_heat_map(count: int) -> None:
    names = [f"down_blocks.{i // 8}.resnets.{i % 8}.conv1.*" for i in range(count - 1)]
    values = {name: (0.1 * (i % 7), -0.5) for i, name in enumerate([*names, "*"])}
    width, height = size_of(draw_heat_map(values, ["1of2", "2of2"], means=(0.3, -0.5)))
    assert width < 4000
    assert height < 3000


def test_coefficients_that_are_all_zero_make_a_heat_map() -> None:
    size_of(draw_heat_map({"mid_block.*": (0.0,), "*": (0.0,)}, ["1of1"], title="nothing"))


def test_groups_are_named_and_ordered_as_the_data_passes_them() -> None:
    ordered = [
        "conv_in", "down_blocks.2", "down_blocks.10", "mid_block", "transformer_blocks.0",
        "single_transformer_blocks.0", "up_blocks.0", "conv_out",
    ]  # fmt: skip
    globs = ["*", *(f"{name}.*" for name in reversed(ordered))]
    named = [group_name(glob) for glob in sorted(globs, key=network_order)]
    assert named == [*ordered, "rest"]


def test_a_long_name_keeps_its_ends() -> None:
    short = shorten("down_blocks.0.attentions.0.to_q", 16)
    assert len(short) == 16
    assert short.startswith("down_")
    assert short.endswith("to_q")
    assert shorten("mid_block", 16) == "mid_block"
