"""In a sentence: how much of a change lies where, and whether random changes look the same."""

from __future__ import annotations

from typing import Any

from deme_cli.analysis.activations_found import ActivationChanges
from deme_cli.analysis.figure import shorten
from deme_cli.timesteps import TimestepRange

_LONGEST = 24  # characters of a name


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
    random = f" (random: {_percent(_mean(told, 'explained', 'channel_map'))})" if told else ""
    return (
        f"{start}: of the variance of the change {_percent(channel)} lies in channels, "
        f"{_percent(place)} in places, {_percent(rest)} in neither ({counted}); "
        f"{_beside(channel, told)}; a channel-wise map W F explains "
        f"{_percent(summary['explained']['channel_map'])} of the change on other draws{random}"
    )


def _beside(channel: float, controls: list[dict[str, Any]]) -> str:
    """The controls' shares, and what they leave of the expert's share in channels.

    More or less than chance explains is said only of an expert beyond all of them.
    """
    if not controls:
        return "whether random weight changes look the same was not measured"
    of_channels = [one["shares"]["channel"] for one in controls]
    if channel > max(of_channels):
        verdict = "it lies more in channels than chance explains"
    elif channel < min(of_channels):
        verdict = "it lies less in channels than chance explains"
    else:
        verdict = "it lies no more in channels than chance explains"
    many = "s" if len(controls) > 1 else ""
    places = _percent(_mean(controls, "shares", "place"))
    return (
        f"{len(controls)} random weight change{many} of the same size: "
        f"{_percent(_mean(controls, 'shares', 'channel'))}{_span(of_channels)}, {places}, so "
        f"{verdict}"
    )


def _span(shares: list[float]) -> str:
    low, high = (f"{100 * end:.0f}" for end in (min(shares), max(shares)))
    return f" ({low}-{high})" if low != high else ""


def _mean(controls: list[dict[str, Any]], what: str, key: str) -> float:
    return sum(one[what][key] for one in controls) / len(controls)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
