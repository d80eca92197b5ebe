"""Protocols by name: what each fixes, whose it is, and what contradicts it."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from deme_cli.config import PROTOCOLS as NAMES
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import ConfigError
from deme_cli.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    apply_protocol,
    find_protocol,
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
def test_what_it_fixes_are_settings_that_can_run(protocol: Protocol) -> None:
    for config in (SampleConfig, EvalConfig):
        assert set(protocol.settings(config)) <= {item.name for item in fields(config)}
        config(**protocol.settings(config))


@every
def test_its_source_and_what_it_leaves_open_are_told(protocol: Protocol) -> None:
    assert re.search(r"DeMe|BK-SDM", protocol.source)
    assert protocol.open


@every
def test_options_that_agree_pass_and_the_others_are_filled_in(protocol: Protocol) -> None:
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


def test_an_unknown_protocol_is_refused_with_the_known_ones() -> None:
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
