"""The protocol card of a measured row: all that its figures depend on, and how a terminal shows it.

It takes up the card of sampling (which model, sampler, steps, seed) and adds what measured the
images: the features and their references, CLIP, the classifier. A figure without its card is not
comparable.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deme_cli import __version__
from deme_cli.evaluation.clip_weights import ClipWeights
from deme_cli.evaluation.comparable import is_known
from deme_cli.evaluation.protocols import find_protocol
from deme_cli.evaluation.references import Reference
from deme_cli.evaluation.weights import ClassifierWeights, FeatureWeights

LIBRARIES = ("torch", "diffusers", "clean-fid", "open-clip-torch")


@dataclass(frozen=True)
class Means:
    """What all rows of a run are measured with: files found, nothing loaded. references: by metric.

    `protocol` is the name of a published one, if the run follows it.
    """

    features: FeatureWeights | None = None
    references: Mapping[str, Reference] = field(default_factory=dict)
    clip: ClipWeights | None = None
    classifier: ClassifierWeights | None = None
    protocol: str | None = None

    def counted(self, references: Mapping[str, Reference]) -> Means:
        """The same with references whose images have been counted."""
        return replace(self, references=references)

    @property
    def card(self) -> dict[str, Any]:
        """Their part of every row's card; features have none where no distance is measured."""
        found: dict[str, Any] = {"protocol": self.protocol}
        if self.features is not None:
            found["features"] = self.features.name
            found["weights_sha256"] = self.features.sha256
            found["weights_published"] = self.features.published
            found["resize"] = self.features.resize
            found["references"] = {name: ref.card for name, ref in self.references.items()}
        if self.clip is not None:
            found["clip_score"] = self.clip.card
        if self.classifier is not None:
            found["accuracy"] = self.classifier.card
        return found


def evaluation_card(card: Mapping[str, Any], means: Means, *, seeds: list[int]) -> dict[str, Any]:
    """The card of one row, from that of its images. seeds: one per repeat, none if finished."""
    measured = means.card
    protocol = find_protocol(measured.get("protocol"))
    if not seeds and protocol is not None and not protocol.drew(card):
        measured["protocol"] = None  # finished images that were drawn otherwise
    return {
        **card,
        **({"seeds": seeds} if seeds else {}),
        **measured,
        "versions": versions(),
    }


def card_digest(card: Mapping[str, Any]) -> str:
    """A card in twelve digits, by which processes tell whether theirs are the same."""
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:12]


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
    lines = list(_measured_with(next(iter(cards.values()))))
    for text, names in _group(cards).items():
        lines.append(f"{', '.join(names)}: {text}")
    return lines


def _measured_with(card: Mapping[str, Any]) -> Iterator[str]:
    if "features" in card:
        yield (
            f"features {card['features']}, resize {card['resize']}, "
            f"weights sha256 {card['weights_sha256'][:12]}{_remark(card['weights_published'])}"
        )
    for metric, reference in card.get("references", {}).items():
        parts = [reference["file"], reference["split"]]
        parts = [part for part in parts if part and part != reference["source"]]
        count = f"{reference['n']} images" if reference["n"] else "images not counted"
        yield f"{metric} against {', '.join([reference['source'], *parts, count])}"
    if clip := card.get("clip_score"):
        yield f"clip_score by {clip['model']}, {clip['weights']}, sha256 {clip['sha256'][:12]}"
    if classifier := card.get("accuracy"):
        yield f"accuracy by {classifier['model']}, sha256 {classifier['sha256'][:12]}"


def _group(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of rows by the sentence that tells how their images are drawn."""
    groups: dict[str, list[str]] = {}
    for name, card in cards.items():
        groups.setdefault(_drawn(card), []).append(name)
    return groups


def _drawn(card: Mapping[str, Any]) -> str:
    if not is_known(card):
        return "finished images of unknown protocol"
    seeds = card.get("seeds") or [card["seed"]]
    span = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    eta = f", eta {card['eta']:g}" if card.get("eta") else ""
    spacing = f", {card['spacing']} spacing" if card["spacing"] else ""
    guidance = f", guidance {card['guidance']:g}" if card.get("guidance") else ""
    return (
        f"{card['sampler']} {card['steps']} steps{spacing}{eta}{guidance}, {card['dtype']}, {span}"
    )


def _remark(published: bool | None) -> str:
    return " (NOT the published weights)" if published is False else ""
