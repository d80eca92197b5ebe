"""What `deme analyze activations` found: every block's change, means over the blocks, a sentence.

Whether the expert's share in channels is beyond chance is judged by the controls alone: they are a
sample of what random weight changes of its size do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deme_cli.analysis.activations.block_change import QUANTILES, BlockChange
from deme_cli.analysis.document import document_bytes
from deme_cli.analysis.figure import shorten
from deme_cli.timesteps import TimestepRange

_LEVEL = 0.95  # of the interval in which chance puts one more share
_LONGEST = 24  # characters of a name
_PROJECTIONS = {  # what is to be said of those that are not there
    "fold": "; the expert's projections were folded into other layers, none is left to look at",
    "none": "; the expert was finetuned without projections",
}
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
        means: Sequence[dict[str, Any] | None] = (
            self.control_means() if self.controls else [None] * len(self.blocks)
        )
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


def document_of(
    found: ActivationChanges, names: tuple[str, str], span: TimestepRange, protocol: dict[str, Any]
) -> bytes:
    """The file: what was measured, and what every block says."""
    return document_bytes(
        "activations", read_activations(names, span, found), protocol, summary=found.summary,
        controls=found.control_summaries, quantiles=QUANTILES, blocks=found.rows(),
        drawn=found.drawn.maps(),
    )  # fmt: skip


def foot_of(protocol: dict[str, Any]) -> str:
    """What was measured, in a line under the picture."""
    data = protocol["data"]
    return (
        f"{protocol['num']:,} draws (image, t, noise) of timesteps {protocol['range']} from "
        f"{shorten(data['source'], 40)} ({data['split']}), the same for every model"
        f"{_PROJECTIONS.get(protocol['expert']['projection'], '')}"
    )


def read_activations(names: tuple[str, str], span: TimestepRange, found: ActivationChanges) -> str:
    """The sentence, with its numbers; names: of base and expert."""
    base, expert = (shorten(name, _LONGEST) for name in names)
    summary = found.summary
    start = (
        f"{expert} changed the features of {base} at timesteps {span} by "
        f"{summary['size']:.2g} of their sd"
    )
    if summary["shares"]["channel"] is None:
        return f"{start}; every block has one place, so channels and places cannot be told apart"
    channel, place, rest = summary["shares"].values()
    counted = f"means of {len(found.blocks)} blocks"
    if summary["negative"]:
        counted += f", {summary['negative']} negative estimates as 0"
    told = [one for one in found.control_summaries if one["shares"]["channel"] is not None]
    random = f" (random: {_percent(_mean_of(told, 'explained', 'channel_map'))})" if told else ""
    return (
        f"{start}: of the variance of the change {_percent(channel)} lies in channels, "
        f"{_percent(place)} in places, {_percent(rest)} in neither ({counted}); "
        f"{_beside(channel, told)}; a channel-wise map W F explains "
        f"{_percent(summary['explained']['channel_map'])} of the change on other draws{random}"
    )


def _beside(channel: float, controls: list[dict[str, Any]]) -> str:
    """The controls' shares, and what they leave of the expert's share in channels."""
    if not controls:
        return "whether random weight changes look the same was not measured"
    of_channels = [one["shares"]["channel"] for one in controls]
    many = "s" if len(controls) > 1 else ""
    places = _percent(_mean_of(controls, "shares", "place"))
    return (
        f"{len(controls)} random weight change{many} of the same size: "
        f"{_percent(_mean_of(controls, 'shares', 'channel'))}{_span(of_channels)}, {places}, "
        f"{_verdict(channel, of_channels)}"
    )


def _verdict(channel: float, of_channels: list[float]) -> str:
    """Whether one more random change would have such a share, to _LEVEL (two-sided).

    With k controls of mean m and standard deviation s, it lies within m +- t_{k-1} s sqrt(1 + 1/k).
    """
    from scipy.stats import t

    k = len(of_channels)
    if k < 2:
        return "too few to tell what chance explains"
    mean, sd = float(np.mean(of_channels)), float(np.std(of_channels, ddof=1))
    reach = float(t.ppf((1 + _LEVEL) / 2, k - 1)) * sd * math.sqrt(1 + 1 / k)
    if abs(channel - mean) <= reach:
        return "so chance may explain what lies in channels"
    return f"so {'more' if channel > mean else 'less'} lies in channels than chance explains"


def _span(shares: list[float]) -> str:
    low, high = (f"{100 * end:.0f}" for end in (min(shares), max(shares)))
    return f" ({low}-{high})" if low != high else ""


def _mean_of(controls: list[dict[str, Any]], what: str, key: str) -> float:
    return sum(one[what][key] for one in controls) / len(controls)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
