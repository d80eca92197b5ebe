"""What a landscape says: one sentence with its numbers, the names of its axes, its document."""

from __future__ import annotations

from deme_cli.analysis import intervals
from deme_cli.analysis.document import document_bytes
from deme_cli.analysis.figure import shorten
from deme_cli.analysis.landscape.directions import cosine, random_direction
from deme_cli.analysis.landscape.found import Landscape, digits, signed
from deme_cli.analysis.landscape.measure import LandscapeAnalysis

_PLACES = {
    "random": "on a random plane through {0}",
    "line": "on the line from {0} to {1}",
    "vectors": "on the plane of {0}, {1} and {2}",
    "pca": "on the plane through {0} along the two principal directions of {count} models",
}


def place_of(found: Landscape, num_spanning: int) -> str:
    """Which line or plane it is; num_spanning: models that make it."""
    names = [shorten(seen.name, 24) for seen in found.models]
    return _PLACES[found.along].format(*names, count=num_spanning - 1)


def read_landscape(found: Landscape, num_spanning: int) -> str:
    """The sentence, with its numbers; num_spanning: models that make the line or the plane."""
    parts = [
        f"{place_of(found, num_spanning)}, {_lowest(found)}",
        _by_range(found),
        _barriers(found) if found.along == "line" else _slopes(found),
    ]
    if found.along in ("vectors", "pca"):
        parts.append(_models(found))
    if found.num_not_finite:
        parts.append(f"{found.num_not_finite} points have a loss that is not finite")
    return "; ".join(part for part in parts if part)


def _lowest(found: Landscape) -> str:
    """What the loss over all timesteps does."""
    origin, pick = found.models[0].name, found.lowest[0]
    if not pick.is_lower:
        return f"no point is better than {origin} for all timesteps by more than chance"
    edge = ", at the edge" if pick.at_edge else ""
    where = ", ".join(signed(value) for value in pick.coordinates)
    return (
        f"the lowest loss over all timesteps differs from that of {origin} by {pick.shown} "
        f"(at {where}{edge})"
    )


def _by_range(found: Landscape) -> str:
    pairs = list(zip(found.groups[1:], found.lowest[1:], strict=True))
    better = [f"{span} ({pick.shown})" for span, pick in pairs if pick.is_lower]
    rest = [str(span) for span, pick in pairs if not pick.is_lower]
    if not better:
        return "none is in any one range"
    told = f"better points lie there for {', '.join(better)}"
    return f"{told}, none for {', '.join(rest)}" if rest else told


def _slopes(found: Landscape) -> str:
    """How steep it is at the origin: for all timesteps, and between which values in the ranges."""
    shown = [
        f"{digits(one)} ± {digits(interval)}"
        for one, interval in zip(found.steepness, found.steepness_intervals, strict=True)
    ]
    ranges = found.steepness[1:]
    low, high = (1 + int(pick(ranges)) for pick in (lambda v: v.argmin(), lambda v: v.argmax()))
    unit = "direction's length" if found.along == "random" else "unit of L2 distance"
    return (
        f"its slope at the origin is {shown[0]} % of the loss per {unit} for all timesteps, "
        f"{shown[low]} ({found.groups[low]}) to {shown[high]} % ({found.groups[high]}) by range"
    )


def _barriers(found: Landscape) -> str:
    """How far the loss rises above the straight line between its ends."""
    first, *ranges = found.barriers
    top = max(range(len(ranges)), key=lambda i: ranges[i].percent)
    pick = ranges[top]
    if not any(one.is_higher for one in found.barriers):
        return "the loss rises nowhere over the straight line of its ends by more than chance"
    whole = first.shown if first.is_higher else "no more than chance"
    most = f", most for {found.groups[1 + top]} ({pick.shown})" if pick.is_higher else ""
    return f"the barrier over the straight line of its ends is {whole} for all timesteps{most}"


def _models(found: Landscape) -> str:
    """The other models' own losses against the origin's, over all timesteps."""
    told = [
        f"{seen.name} {signed(seen.percent[0])} ± {digits(seen.interval[0])} %"
        for seen in found.models[1:]
    ]
    return f"against {found.models[0].name} the models' own losses are {', '.join(told)}"


def axis_labels(analysis: LandscapeAnalysis) -> list[str]:
    """What lies along each axis, with its unit."""
    names = [shorten(model.name, 20) for model in analysis.models]
    if analysis.basis is None:
        return [f"random direction {i}\n(1: as long as the weights)" for i in (1, 2)]
    if analysis.config.along == "line":
        return [f"a, of (1 - a) {names[0]} + a {names[1]}"]
    if analysis.config.along == "vectors":
        return [
            f"L2 distance along {names[1]} - {names[0]}",
            f"L2 distance, what {names[2]} - {names[0]} adds",
        ]
    shares = (100 * analysis.basis.shares).tolist()
    return [
        f"L2 distance, principal direction {i}\n(explains {share:.0f} % of the task vectors)"
        for i, share in enumerate(shares, 1)
    ]


def foot_of(analysis: LandscapeAnalysis, found: Landscape) -> str:
    """What was measured, in a line under the picture."""
    config = analysis.config
    return (
        f"{analysis.examples.source} ({analysis.setup.split}), {config.num:,} draws, the same at "
        f"all {found.losses[0].size:,} points; numbers: {config.report_num:,} fresh draws, ± 95 % "
        f"over images; seed {config.seed}"
    )


def document_of(analysis: LandscapeAnalysis, found: Landscape) -> bytes:
    """The file: what was measured, the axes, the losses of every point, what they say."""
    config, examples, basis = analysis.config, analysis.examples, analysis.basis
    reading = read_landscape(found, analysis.num_spanning)
    protocol = {
        "along": config.along,
        "spanning": analysis.num_spanning,
        "models": [
            {"source": model.argument, "kind": model.record.kind,
             "fingerprint": model.record.fingerprint}
            for model in analysis.models
        ],
        "data": {"source": examples.source, "fingerprint": examples.fingerprint},
        "image_shape": list(examples.image_shape),
        "split": analysis.setup.split,
        "points": config.points,
        "span": config.reach,
        "num": config.num,
        "seed": config.seed,
        "report_num": config.report_num,
        "report_seed": config.seed + 1,
        "intervals": intervals.MEANING,
    }  # fmt: skip
    axes = [
        {"label": label.replace("\n", " "), "values": axis.tolist()}
        for label, axis in zip(axis_labels(analysis), found.axes, strict=True)
    ]
    if basis is None:
        weights = analysis.models[0].weights
        geometry = {"cosine": cosine(*(random_direction(weights, config.seed, i) for i in (0, 1)))}
    else:
        geometry = {"explained": basis.shares.tolist()}
    return document_bytes(
        "landscape", reading, protocol, axes=axes, geometry=geometry, **found.rows()
    )
