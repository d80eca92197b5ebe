from __future__ import annotations

import pytest

from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.timesteps import (
    TimestepRange,
    parse_range,
    parse_span,
    require_cover,
    route,
    split_uniform,
)


@pytest.mark.parametrize(("n", "total"), [(1, 1), (4, 1000), (3, 1000), (7, 50), (8, 1000), (6, 7)])
def test_a_split_covers_every_timestep_once_and_routes_by_floor(n: int, total: int) -> None:
    ranges = split_uniform(n, total)
    assert [t for span in ranges for t in range(span.start, span.stop)] == list(range(total))
    assert [route(t, ranges) for t in range(total)] == [t * n // total for t in range(total)]


def test_a_fraction_names_the_same_range_as_its_span() -> None:
    assert parse_range("2/4", 1000).range == parse_range("250:500", 1000).range
    assert parse_range(" 250:500 ", 1000).range == parse_span("250:500 ", "span")
    assert parse_range("2/4", 1000).label == "2of4"
    assert parse_range("250:500", 1000).label == "250-500"
    assert parse_range("1/1", 1000).range == TimestepRange(0, 1000)
    assert parse_range("0:1000", 1000).range == TimestepRange(0, 1000)


def test_a_fraction_follows_a_split_of_that_many_ranges() -> None:
    split = [TimestepRange(0, 100), TimestepRange(100, 1000)]
    assert parse_range("2/2", 1000, split).range == TimestepRange(100, 1000)
    assert parse_range("2/4", 1000, split).range == TimestepRange(250, 500)


def test_a_wrong_range_is_refused_with_what_was_expected() -> None:
    for text, word in (
        ("5/4", "1 <= i <= N"), ("0/4", "1 <= i <= N"), ("1/0", "1 <= i <= N"),
        ("a/b", "expected i/N"), ("", "expected i/N"), ("500:250", "start < stop"),
        ("0:2000", "<= 1000"), ("-5:10", "0 <= start"), ("3/2000", "1 to 1000"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=word):
            parse_range(text, 1000)
    with pytest.raises(ConfigError, match="empty or negative"):
        TimestepRange(5, 5)


def test_a_gap_or_overlap_is_named() -> None:
    for spans, word in (
        ([(0, 50), (60, 100)], "no expert covers timesteps 50:60"),
        ([(0, 60), (50, 100)], "two experts cover timesteps 50:60"),
        ([(10, 100)], "no expert covers timesteps 0:10"),
        ([(0, 90)], "no expert covers timesteps 90:100"),
        ([(0, 110)], "past the model's 100"),
        ([(0, 100), (0, 50)], "two experts cover"),
    ):
        with pytest.raises(ArtifactError, match=word):
            require_cover([TimestepRange(*span) for span in spans], 100)


def test_fractional_and_outer_timesteps_find_the_nearest_range() -> None:
    ranges = split_uniform(4, 1000)
    assert route(249.9, ranges) == 0
    assert route(1000, ranges) == 3
    assert route(-1, ranges) == 0
