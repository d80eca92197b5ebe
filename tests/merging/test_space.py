"""The space of a search: points, and the coefficients that they stand for."""

from __future__ import annotations

import pytest

from deme_cli.errors import ConfigError
from deme_cli.merging.space import Space

EXPERTS = ("1of3", "2of3", "3of3")
BOUNDS = ((-0.5, 1.5), (0.0, 1.0), (-2.0, 2.0))
START = (0.25, 0.5, -1.0)
WHOLE = Space(EXPERTS, BOUNDS, START)
PARTS = Space(
    EXPERTS, BOUNDS, START, groups=("down_blocks.0.*", "mid_block.*"),
    fixed={"*.bias": (1.0, 0.0, 0.0)}, shares=(1.0, 2.0, 5.0),
)  # fmt: skip
CLOSED = Space(
    EXPERTS, BOUNDS, START, groups=("a.*", "b.*"), has_rest=False, shares=(1.0, 3.0)
)  # fmt: skip
SPACES = pytest.mark.parametrize("space", [WHOLE, PARTS, CLOSED], ids=["whole", "parts", "closed"])


@SPACES
def test_every_number_of_a_point_has_a_name_of_its_own_and_bounds(space: Space) -> None:
    count = space.dimensions
    assert count == 3 * len(space.all_groups)
    assert len(space.labels) == len(set(space.labels)) == len(space.box) == count
    for points in (space.start_point, space.base, space.mean):
        assert len(points) == count
    for label, pair, w in zip(space.labels, space.box, space.start_point, strict=True):
        expert = EXPERTS.index(label.split(" ")[0])
        assert pair == BOUNDS[expert]
        assert w == START[expert]


@SPACES
def test_a_point_is_its_groups_one_after_another(space: Space) -> None:
    point = tuple(float(i) for i in range(space.dimensions))
    by_group = space.by_group(point)
    assert tuple(by_group) == space.all_groups
    assert sum(by_group.values(), ()) == point
    for index, label in enumerate(space.labels):
        expert, _, group = label.partition(" ")
        assert by_group[group or "*"][EXPERTS.index(expert)] == point[index]


@SPACES
def test_the_same_everywhere_is_summed_up_as_itself(space: Space) -> None:
    assert space.summary(space.start_point) == pytest.approx(START)
    assert space.summary(space.base) == (0.0, 0.0, 0.0)
    assert space.summary(space.mean) == pytest.approx((1 / 3,) * 3)


def test_a_summary_weighs_groups_by_their_parameters() -> None:
    point = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    assert PARTS.summary(point) == (1 / 8, 2 / 8, 5 / 8)
    assert CLOSED.summary(point[:6]) == (1 / 4, 3 / 4, 0.0)


def test_a_point_means_coefficients_for_every_tensor() -> None:
    point = tuple(float(i) for i in range(9))
    found = PARTS.coefficients(point)
    assert found.of("down_blocks.0.conv.weight") == (0.0, 1.0, 2.0)
    assert found.of("mid_block.conv.weight") == (3.0, 4.0, 5.0)
    assert found.of("conv_in.weight") == found.values == (6.0, 7.0, 8.0)
    assert found.of("mid_block.conv.bias") == (1.0, 0.0, 0.0), "what is fixed is decided first"
    assert WHOLE.coefficients(START).of("anything") == START
    assert WHOLE.coefficients(START).finer == {}
    closed = CLOSED.coefficients(point[:6])
    assert closed.of("b.weight") == (3.0, 4.0, 5.0)
    assert closed.values == CLOSED.summary(point[:6]), "of no tensor, but it is what is shown"


def test_slopes_are_summed_by_group_and_fixed_tensors_left_out() -> None:
    space = Space(
        ("a", "b"), ((0.0, 1.0),) * 2, (0.5, 0.5), groups=("mid_block.*",), shares=(0.5, 0.5),
        fixed={"*.bias": (1.0, 1.0)},
    )  # fmt: skip
    by_tensor = {
        "mid_block.a.weight": (1.0, 2.0), "mid_block.b.weight": (10.0, 20.0),
        "mid_block.b.bias": (1e3, 1e3), "conv_in.weight": (5.0, 7.0), "conv_in.bias": (1e3, 1e3),
    }  # fmt: skip
    assert space.slopes(by_tensor) == [11.0, 22.0, 5.0, 7.0]


@pytest.mark.parametrize(
    ("bounds", "start", "words"),
    [
        (
            ((0.0, 1.0), (0.0, 1.0)),
            (0.5, 1.5),
            "exclude the start 1.5 of expert 2of2; set wider bounds",
        ),
        (
            ((0.6, 1.0), (0.0, 1.0)),
            (0.5, 0.5),
            "exclude the start 0.5 of expert 1of2; set wider bounds",
        ),
        (((1.0, 0.0), (0.0, 1.0)), (0.5, 0.5), "bounds 1,0: expected the lower bound first"),
        (((0.5, 0.5), (0.0, 1.0)), (0.5, 0.5), "bounds 0.5,0.5: expected the lower bound first"),
        (((float("nan"), 1.0), (0.0, 1.0)), (0.5, 0.5), "expected the lower bound first"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(bounds: tuple, start: tuple, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Space(("1of2", "2of2"), bounds, start)
    assert words in str(caught.value)


def test_a_start_on_its_bounds_is_within_them() -> None:
    assert Space(("a", "b"), ((0.0, 1.0),) * 2, (0.0, 1.0)).start_point == (0.0, 1.0)


def test_one_expert_has_one_number() -> None:
    space = Space(("1of1",), ((-0.5, 1.5),), (1.0,))
    assert (space.dimensions, space.labels, space.base, space.mean) == (1, ["1of1"], (0.0,), (1.0,))
