"""What is said of an expert beside random changes: more than chance if chance rarely has it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from deme_cli.analysis.activations.block_change import BlockChange, Explained, Parts
from deme_cli.analysis.activations.found import (
    ActivationChanges,
    _verdict,
    read_activations,
)
from deme_cli.timesteps import TimestepRange

ONES = np.ones(4)
NAN = math.nan
FOUR = (0.2, 0.22, 0.25, 0.3)
BLOCK = BlockChange(
    "mid_block", (2, 2), 1.0, 0.1, 0.0, Parts(0.3, -0.1, 0.7), Parts(0.3, 0, 0.7), (0, 0), (0, 0),
    Explained(0.5, 0.1, 0.1), ONES, ONES, ONES, ONES,
)  # fmt: skip


def reading(channel: float, *controls: float, names: tuple[str, str] = ("base", "ft")) -> str:
    found = [[replace(BLOCK, shares=Parts(one, 0, 1 - one))] * 60 for one in (channel, *controls)]
    changes = ActivationChanges(found[0], BLOCK, found[1:])
    return read_activations(names, TimestepRange(750, 1000), changes)


@pytest.mark.parametrize(
    ("channel", "controls", "said"),
    [
        (0.5, FOUR, "4 random weight changes of the same size: 24 % (20-30), 0 %, so "
         "more lies in channels than chance explains"),
        (0.32, FOUR, "so chance may explain what lies in channels"),
        (0.02, FOUR, "so less lies in channels than chance explains"),
        (0.4, (0.2, 0.3), "25 % (20-30), 0 %, so chance may explain"),
        (0.9, (0.3,), "1 random weight change of the same size: 30 %, 0 %, too few to tell what"),
        (0.4, (), "whether random weight changes look the same was not measured"),
        (0.4, (NAN,), "whether random weight changes look the same was not measured"),
        (NAN, (0.2,), "every block has one place, so channels and places cannot be told apart"),
    ],
)  # fmt: skip
def test_more_than_chance_is_beyond_what_one_more_control_would_have(
    channel: float, controls: tuple[float, ...], said: str
) -> None:
    assert said in reading(channel, *controls)


def test_chance_is_taken_for_more_than_chance_one_time_in_twenty() -> None:
    draws = np.random.default_rng(0).normal(0.3, 0.05, (400, 5))
    told = [_verdict(own, controls) for own, *controls in draws.tolist()]
    assert np.mean(["than chance" in one for one in told]) == pytest.approx(0.05, abs=0.03)


def test_the_sentence_stays_short_with_long_names() -> None:
    assert "random: 50 %" in (said := reading(0.4, 0.2, 0.3, names=("b" * 90, "e" * 90)))
    assert len(said) < 450
