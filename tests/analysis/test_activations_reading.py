"""What is said of an expert beside random changes: more than chance only beyond all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from deme_cli.analysis.activations_found import ActivationChanges
from deme_cli.analysis.activations_reading import read_activations
from deme_cli.analysis.block_change import BlockChange, Explained, Parts
from deme_cli.timesteps import TimestepRange

ONES = np.ones(4)
NAN = math.nan
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
        (0.4, (0.2, 0.3), "2 random weight changes of the same size: 25 % (20-30), 0 %, so it lies "
         "more in channels than chance explains"),
        (0.25, (0.2, 0.3), "25 % (20-30), 0 %, so it lies no more in channels than chance"),
        (0.3, (0.3,), "1 random weight change of the same size: 30 %, 0 %, so it lies no more in"),
        (0.1, (0.2, 0.3), "so it lies less in channels than chance explains"),
        (0.4, (), "whether random weight changes look the same was not measured"),
        (0.4, (NAN,), "whether random weight changes look the same was not measured"),
        (NAN, (0.2,), "every block has one place, so channels and places cannot be told apart"),
    ],
)  # fmt: skip
def test_more_than_chance_is_beyond_every_control(
    channel: float, controls: tuple[float, ...], said: str
) -> None:
    assert said in reading(channel, *controls)


def test_the_sentence_stays_short_with_long_names() -> None:
    assert "random: 50 %" in (said := reading(0.4, 0.2, 0.3, names=("b" * 90, "e" * 90)))
    assert len(said) < 450
