"""The protocol card of a measured row: all that its figures depend on, and how a terminal shows it.

It takes up the card of sampling (which model, sampler, steps, seed) and adds the features, the
references and the counts. A figure without its card is not comparable.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from deme_cli import __version__
from deme_cli.evaluation.references import Reference
from deme_cli.evaluation.rows import Row
from deme_cli.evaluation.weights import FeatureWeights

LIBRARIES = ("torch", "diffusers", "clean-fid")


def evaluation_card(
    row: Row, weights: FeatureWeights, references: Mapping[str, Reference], *, seeds: list[int]
) -> dict[str, Any]:
    """The card of one row. references: by metric; seeds: one per repeat, none if finished."""
    return {
        **row.card,
        **({"seeds": seeds} if seeds else {}),
        "features": weights.name,
        "weights_sha256": weights.sha256,
        "weights_published": weights.published,
        "resize": weights.resize,
        "references": {metric: reference.card for metric, reference in references.items()},
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """deme and the libraries that a figure may depend on, without importing them."""
    found: dict[str, str | None] = {"deme": __version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe_cards(cards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines for the terminal: what all rows share once, then what tells them apart."""
    first = next(iter(cards.values()))
    lines = [
        f"features {first['features']}, resize {first['resize']}, "
        f"weights sha256 {first['weights_sha256'][:12]}{_remark(first['weights_published'])}"
    ]
    for metric, reference in first["references"].items():
        parts = [reference["source"], reference["file"], reference["split"]]
        count = f"{reference['n']} images" if reference["n"] else "images not counted"
        shown = [part for part in parts if part and part != reference["source"]]
        lines.append(f"{metric} against {', '.join([reference['source'], *shown, count])}")
    for names, text in _group(cards).items():
        lines.append(f"{', '.join(text)}: {names}")
    return lines


def _group(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of rows by the sentence that tells how their images are drawn."""
    groups: dict[str, list[str]] = {}
    for name, card in cards.items():
        groups.setdefault(_drawn(card), []).append(name)
    return groups


def _drawn(card: Mapping[str, Any]) -> str:
    if "sampler" not in card:
        return "finished images of unknown protocol"
    seeds = card.get("seeds") or [card["seed"]]
    span = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    eta = f", eta {card['eta']:g}" if card.get("eta") else ""
    return (
        f"{card['sampler']} {card['steps']} steps, {card['spacing']} spacing{eta}, "
        f"{card['dtype']}, seed {span}"
    )


def _remark(published: bool | None) -> str:
    return " (NOT the published weights)" if published is False else ""
