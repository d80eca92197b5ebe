"""Protocols by name: what each fixes, and what contradicts it; which rows one table may have."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest

from deme_cli.config import PROTOCOLS as NAMES
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import ConfigError
from deme_cli.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    apply_protocol,
    describe_cards,
    find_protocol,
    require_one_protocol,
    require_reference,
)

DDIM = {"sampler": "ddim", "eta": 0.0, "num": 50_000}
SD = {
    "sampler": "pndm", "steps": 25, "guidance": 7.5, "resolution": 512, "resize": 256,
    "per_prompt": 1, "seed": 1234,
}  # fmt: skip
PYTORCH_FID = {"features": "inception", "resize": "legacy_pytorch"}
CLIP = {"clip_score": True, "clip_model": "ViT-g-14", "clip_weights": "laion2b_s34b_b88k"}
FIXED = {
    "ddim-cifar10": ({**DDIM, "steps": 100}, {**PYTORCH_FID, "fid": "cifar10"}),
    "lsun-church-50k": ({**DDIM, "steps": 50}, {**PYTORCH_FID, "fid": "lsun-church"}),
    "lsun-bedroom-50k": ({**DDIM, "steps": 50}, PYTORCH_FID),
    "bk-sdm-coco30k": ({**SD, "prompts": "coco", "num": 30_000}, {**PYTORCH_FID, **CLIP}),
    "parti": ({**SD, "prompts": "parti", "num": 1632}, CLIP),
    "imagenet": ({**SD, "prompts": "imagenet", "num": 50_000}, {**PYTORCH_FID, **CLIP}),
}
every = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def test_every_name_of_the_config_is_a_protocol() -> None:
    assert tuple(PROTOCOLS) == NAMES == tuple(FIXED)


@every
def test_a_protocol_fixes_what_its_source_says(protocol: Protocol) -> None:
    sample, evaluation = FIXED[protocol.name]
    assert protocol.settings(SampleConfig) == sample
    shared = {name: sample[name] for name in ("num", "seed") if name in sample}
    assert protocol.settings(EvalConfig) == {**shared, **evaluation}


@every
def test_what_it_fixes_can_run_and_its_source_is_told(protocol: Protocol) -> None:
    for config in (SampleConfig, EvalConfig):
        assert set(protocol.settings(config)) <= {item.name for item in fields(config)}
        config(**protocol.settings(config))
    assert re.search(r"DeMe|BK-SDM", protocol.source)
    assert protocol.open
    fixed = protocol.settings(SampleConfig)
    options = {"steps": fixed["steps"], "sampler": None, "batch_size": 7}
    assert apply_protocol(protocol, SampleConfig, options) == {**fixed, "batch_size": 7}


def test_an_option_that_contradicts_is_refused_with_both_values() -> None:
    protocol = find_protocol("bk-sdm-coco30k")
    with pytest.raises(ConfigError, match="--steps 50: the protocol bk-sdm-coco30k has 25"):
        apply_protocol(protocol, SampleConfig, {"steps": 50})
    with pytest.raises(ConfigError, match=r"--clip-score false: .* has true"):
        apply_protocol(protocol, EvalConfig, {"clip_score": False})
    with pytest.raises(ConfigError, match=r"--resize-to 64: .* has 256; leave --resize-to out"):
        apply_protocol(protocol, SampleConfig, {"resize": 64})


def test_without_a_protocol_options_stay_as_they_are() -> None:
    assert find_protocol(None) is None
    assert apply_protocol(None, SampleConfig, {"steps": 3}) == {"steps": 3}
    with pytest.raises(ConfigError, match="expected one of ddim-cifar10"):
        find_protocol("coco")


@pytest.mark.parametrize("name", ["lsun-bedroom-50k", "bk-sdm-coco30k", "imagenet"])
def test_the_reference_that_is_left_to_the_user_is_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} measures against .* --fid FOLDER"):
        require_reference(find_protocol(name), None)
    require_reference(find_protocol(name), "folder")


@pytest.mark.parametrize("name", ["ddim-cifar10", "lsun-church-50k", "parti", None])
def test_other_protocols_name_their_reference_or_need_none(name: str | None) -> None:
    require_reference(find_protocol(name), None)


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
    assert remarks(CARD, {**CARD, "guidance": None}) == []  # which an older card does not know


@pytest.mark.parametrize(
    ("field", "value"),
    [("sampler", "pndm"), ("eta", 1.0), ("guidance", 7.5), ("prompts_sha256", "f" * 64)],
)
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


def test_images_without_a_card_beside_some_with_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no protocol card.*--mixed"):
        remarks(CARD, {"images": "f"})
    assert remarks({"images": "f"}, {"images": "g"}) == []


@pytest.mark.parametrize("field", ["sampler", "seed"])
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
