"""Which rows may stand in one table."""

from __future__ import annotations

from typing import Any

import pytest

from deme_cli.errors import ConfigError
from deme_cli.evaluation.comparable import require_one_protocol
from deme_cli.evaluation.protocol import describe_cards

CARD: dict[str, Any] = {
    "model": "base", "source": "digits", "fingerprints": ["a"], "ranges": [[0, 1000]],
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sampler": "ddim", "steps": 50,
    "spacing": "leading", "eta": 0.0, "clip_sample": True, "dtype": "fp32", "seed": 0, "num": 9,
}  # fmt: skip


def remarks(*cards: dict[str, Any], mixed: bool = False, counts: list[int] | None = None) -> list:
    names = [f"row{index}" for index in range(len(cards))]
    numbers = dict(zip(names, counts or [9] * len(cards), strict=True))
    return require_one_protocol(dict(zip(names, cards, strict=True)), numbers, mixed=mixed)


def test_who_drew_may_differ() -> None:
    other = {
        **CARD, "model": "ensemble", "source": "x", "fingerprints": ["b", "c"], "num": 50,
        "ranges": [[0, 500], [500, 1000]], "prediction_type": "sample", "images": "f",
        "prompts": {"source": "x"}, "companions": {"vae": "f"},
    }  # fmt: skip
    assert remarks(CARD, other) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampler", "pndm"), ("steps", 20), ("spacing", "trailing"), ("eta", 1.0),
        ("guidance", 7.5), ("resolution", 512), ("resize_to", 256), ("clip_sample", False),
        ("dtype", "fp16"), ("prompts_sha256", "f" * 64), ("classes", "0-9"),
    ],
)  # fmt: skip
def test_how_images_were_drawn_may_not(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"row0 and row1 are of different protocols: {field} "):
        remarks(CARD, {**CARD, field: value})


def test_every_field_that_differs_is_named_with_both_values() -> None:
    other = {**CARD, "steps": 20, "guidance": 7.5}
    with pytest.raises(ConfigError) as raised:
        remarks(CARD, CARD, other, counts=[9, 9, 5])
    message = str(raised.value)
    assert "row0 and row2 are of different protocols" in message
    for words in ("steps 50 and 20", "guidance none and 7.5", "n 9 and 5", "add --mixed"):
        assert words in message


def test_a_field_unknown_to_an_older_card_counts_as_none() -> None:
    assert remarks(CARD, {**CARD, "guidance": None, "classes": None}) == []


def test_images_without_a_card_beside_some_with_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no protocol card.*--mixed"):
        remarks(CARD, {"images": "f"})
    assert remarks({"images": "f"}, {"images": "g"}) == []


@pytest.mark.parametrize("field", ["sampler", "steps", "spacing", "dtype", "seed"])
def test_a_card_without_its_essentials_counts_as_none(field: str) -> None:
    rest = {name: value for name, value in CARD.items() if name != field}
    assert describe_cards({"drawn": rest}) == ["drawn: finished images of unknown protocol"]
    with pytest.raises(ConfigError, match="no protocol card"):
        remarks(CARD, rest)


def test_mixed_rows_are_allowed_and_told() -> None:
    (told,) = remarks(CARD, {**CARD, "steps": 20}, mixed=True)
    assert "steps 50 and 20" in told
    (told,) = remarks(CARD, {"images": "f"}, mixed=True)
    assert "no protocol card" in told


def test_other_seeds_are_told_and_not_refused() -> None:
    (told,) = remarks(CARD, {**CARD, "seed": 5})
    assert "row0 0, row1 5" in told
    assert "not paired" in told


def test_long_values_are_shortened() -> None:
    with pytest.raises(ConfigError) as raised:
        remarks({**CARD, "classes": "1," * 500}, {**CARD, "classes": "1"})
    assert len(str(raised.value)) < 300
