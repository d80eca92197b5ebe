"""What `deme analyze activations` found: every block's change, and its means over the blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deme_cli.analysis.block_change import BlockChange

_OF_PARTS = ("shares", "fixed", "explained")


@dataclass(frozen=True)
class ActivationChanges:
    """Every block in the network's order, and the one whose maps are drawn.

    controls: the blocks of each network with random weight changes of the same size.
    """

    blocks: Sequence[BlockChange]
    drawn: BlockChange
    controls: Sequence[Sequence[BlockChange]] = ()

    @property
    def summary(self) -> dict[str, Any]:
        """Means over the blocks of the expert; see `summarize`."""
        return summarize(self.blocks)

    @property
    def control_summaries(self) -> list[dict[str, Any]]:
        """The same of each control."""
        return [summarize(blocks) for blocks in self.controls]

    def control_means(self) -> list[dict[str, Any]]:
        """Of each block, `shares` and `explained` as means over the controls; [] without any."""
        by_block = zip(*self.controls, strict=True)
        return [_means([block.row() for block in one], ("shares", "explained")) for one in by_block]

    def rows(self) -> list[dict[str, Any]]:
        """The numbers of every block as JSON holds them, the means of the controls among them."""
        means = self.control_means() or [None] * len(self.blocks)
        return [
            {**block.row(), "controls": mean}
            for block, mean in zip(self.blocks, means, strict=True)
        ]


def summarize(blocks: Sequence[BlockChange]) -> dict[str, Any]:
    """Means over the blocks of which it can be told, None where there are none.

    negative: how many blocks have a negative component, counted as a share of 0.
    """
    rows = [block.row() for block in blocks]
    negative = sum(min(b.components.channel, b.components.place) < 0 for b in blocks)
    return {
        "size": _mean(row["size"] for row in rows),
        "shift": _mean(row["shift"] for row in rows),
        **_means(rows, _OF_PARTS),
        "negative": negative,
    }


def _means(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    return {
        name: {key: _mean(row[name][key] for row in rows) for key in rows[0][name]}
        for name in names
    }


def _mean(values: Iterable[float]) -> float | None:
    told = [value for value in values if not math.isnan(value)]
    return sum(told) / len(told) if told else None
