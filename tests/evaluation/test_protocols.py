"""Protocols by name: what each fixes, and what contradicts it; which rows one table may have."""

from __future__ import annotations

import re
from typing import Any

import pytest

from deme_cli.config import PROTOCOLS as NAMES
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import ConfigError
from deme_cli.evaluation.protocols import (
    PROTOCOLS,
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


def test_a_protocol_fixes_what_its_source_says_and_what_can_run() -> None:
    assert tuple(PROTOCOLS) == NAMES == tuple(FIXED)
    for name, protocol in PROTOCOLS.items():
        sample, evaluation = FIXED[name]
        shared = {key: sample[key] for key in ("num", "seed") if key in sample}
        for config, expected in ((SampleConfig, sample), (EvalConfig, {**shared, **evaluation})):
            assert apply_protocol(protocol, config, {}) == expected
            config(**expected)  # what can run
        assert re.search(r"DeMe|BK-SDM", protocol.source)
        assert protocol.open
        options = {"steps": sample["steps"], "sampler": None, "batch_size": 7}
        assert apply_protocol(protocol, SampleConfig, options) == {**sample, "batch_size": 7}
        asked = name in ("lsun-bedroom-50k", "bk-sdm-coco30k", "imagenet")
        assert (protocol.reference is not None) is asked
        require_reference(protocol, "folder" if asked else None)
        if asked:  # for the images that it leaves to the user
            with pytest.raises(ConfigError, match=f"{name} measures against .* --fid FOLDER"):
                require_reference(protocol, None)


def test_an_option_that_contradicts_is_refused_with_both_values() -> None:
    protocol = find_protocol("bk-sdm-coco30k")
    for config, options, fault in (
        (SampleConfig, {"steps": 50}, "--steps 50: the protocol bk-sdm-coco30k has 25"),
        (EvalConfig, {"clip_score": False}, "--clip-score false: .* has true"),
        (SampleConfig, {"resize": 64}, "--resize-to 64: .* has 256; leave --resize-to out"),
    ):
        with pytest.raises(ConfigError, match=fault):
            apply_protocol(protocol, config, options)
    assert apply_protocol(find_protocol(None), SampleConfig, {"steps": 3}) == {"steps": 3}
    with pytest.raises(ConfigError, match="expected one of ddim-cifar10"):
        find_protocol("coco")


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
    (told,) = remarks(CARD, {**CARD, "seed": 5})
    assert "row0 0, row1 5" in told
    assert "not paired" in told


def test_how_images_were_drawn_may_not_and_every_difference_is_named() -> None:
    for field, value in (("sampler", "pndm"), ("eta", 1.0), ("prompts_sha256", "f" * 64)):
        with pytest.raises(ConfigError, match=f"row0 and row1 are of different prot.*: {field} "):
            remarks(CARD, {**CARD, field: value})
    other = {**CARD, "steps": 20, "guidance": 7.5, "classes": "1," * 500}
    with pytest.raises(ConfigError) as raised:
        remarks(CARD, CARD, other, counts=[9, 9, 5])
    message = str(raised.value)
    assert "row0 and row2 are of different protocols" in message
    for words in ("steps 50 and 20", "guidance none and 7.5", "n 9 and 5", "add --mixed"):
        assert words in message
    assert len(message) < 300
    (told,) = remarks(CARD, {**CARD, "steps": 20}, mixed=True)
    assert "steps 50 and 20" in told


def test_a_card_without_its_essentials_counts_as_none() -> None:
    for absent in ("sampler", "steps", "spacing", "dtype", "seed"):
        rest = {name: value for name, value in CARD.items() if name != absent}
        assert describe_cards({"drawn": rest}) == ["drawn: finished images of unknown protocol"]
        with pytest.raises(ConfigError, match=r"no protocol card.*--mixed"):
            remarks(CARD, rest)
        assert "no protocol card" in remarks(CARD, rest, mixed=True)[0]
        assert remarks({"images": "f"}, {"images": "g"}) == []
