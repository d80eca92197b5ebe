"""Whether rows may stand in one table: their images were drawn under one protocol.

The cards of the rows are compared field by field. Who drew (model, source, fingerprints) may differ
and is what a table is about; so may the seed, but then rows are not paired. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deme_cli.errors import ConfigError

Card = Mapping[str, Any]
# Fields that say who drew, from which noise, how many in all, and from where files were read.
WHO_AND_WHENCE = frozenset(
    (
        "model", "source", "fingerprints", "ranges", "num_train_timesteps", "prediction_type",
        "seed", "seeds", "num", "companions", "pipeline", "images", "protocol", "prompts",
    )
)  # fmt: skip
_HOW = ("sampler", "steps", "spacing", "dtype", "seed")  # without which a card tells too little
_SHOWN = 40


def require_one_protocol(
    cards: Mapping[str, Card], counts: Mapping[str, int], *, mixed: bool
) -> list[str]:
    """What a reader should know of rows that differ, by their cards and their numbers of images.

    Raises ConfigError, unless `mixed`, naming the first two rows that differ and every field.
    """
    names = list(cards)
    remarks = []
    for name in names[1:]:
        found = compare(cards[names[0]], cards[name], counts[names[0]], counts[name])
        if found is None:
            what = "nobody noted how the images of one of them were drawn: it has no protocol card"
        else:
            what = "; ".join(f"{field} {_shown(a)} and {_shown(b)}" for field, a, b in found)
        if what:
            remarks.append(f"{names[0]} and {name} are of different protocols: {what}")
    if remarks and not mixed:
        raise ConfigError(f"{remarks[0]}; measure them in separate runs, or add --mixed")
    return remarks + _about_seeds(cards)


def compare(
    card: Card, other: Card, count: int, other_count: int
) -> list[tuple[str, Any, Any]] | None:
    """(field, value, other value) of all that differs; None where one of the two has no card."""
    if is_known(card) != is_known(other):
        return None
    fields = [field for field in dict.fromkeys([*card, *other]) if field not in WHO_AND_WHENCE]
    pairs = [("n", count, other_count), *((f, card.get(f), other.get(f)) for f in fields)]
    return [pair for pair in pairs if pair[1] != pair[2]]


def is_known(card: Card) -> bool:
    """Whether a card tells how images were drawn."""
    return all(name in card for name in _HOW)


def _about_seeds(cards: Mapping[str, Card]) -> list[str]:
    seeds = {name: card.get("seed") for name, card in cards.items() if is_known(card)}
    if len(set(seeds.values())) < 2:
        return []
    listed = ", ".join(f"{name} {seed}" for name, seed in seeds.items())
    return [f"seeds differ ({listed}): these rows do not share their noise and are not paired"]


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
