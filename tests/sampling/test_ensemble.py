"""Which experts make an ensemble."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_tiny_base, write_tiny_expert

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import SampleConfig
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.sampling.conditioning import protocol_card
from deme_cli.sampling.ensemble import open_ensemble, read_ensemble
from deme_cli.sampling.store import first_difference

EXPERTS = [Path(f"ft_{index}of4.safetensors") for index in range(1, 5)]


def test_what_is_no_ensemble_is_refused_and_says_how_to_close_a_gap(run_folder: Path) -> None:
    base = Path("base.safetensors")
    write_tiny_base(Path("other.safetensors"), seed=7)
    write_tiny_expert(Path("half.safetensors"), base, index=1, of=2)
    write_tiny_expert(Path("its.safetensors"), Path("other.safetensors"), index=2, of=4)
    for paths, fault in (
        ([EXPERTS[0], *EXPERTS[2:]], r"no expert covers timesteps 25:50.*--range 25:50"),
        (EXPERTS[:3], "no expert covers timesteps 75:100"),
        ([*EXPERTS, Path("half.safetensors")], "two experts cover timesteps"),
        ([EXPERTS[0], *EXPERTS], "two experts cover timesteps 0:25"),
        ([EXPERTS[0], Path("its.safetensors"), *EXPERTS[2:]], "its.safetensors: another base than"),
        ([base], "expected an artifact of kind 'expert', found 'base'"),
    ):
        with pytest.raises(ArtifactError, match=fault):
            read_ensemble(paths)
    with pytest.raises(ConfigError, match="--device warp"):
        open_ensemble(EXPERTS, device="warp")


def test_an_expert_with_other_surroundings_is_refused(run_folder: Path) -> None:
    record, weights = read_record(EXPERTS[1], "expert"), load_tensors(EXPERTS[1])
    for name, change, fault in (
        ("model_config", {"dropout": 0.5}, "model config"),
        ("companions", {"vae": "0" * 64}, "set of frozen parts"),
        ("scheduler_config", {"beta_end": 0.1}, "scheduler config"),
    ):
        changed = replace(record, **{name: {**getattr(record, name), **change}})
        write_artifact(EXPERTS[1], weights, changed)
        with pytest.raises(ArtifactError, match=f"another {fault} than"):
            open_ensemble(EXPERTS)


def test_the_card_names_every_member_and_the_effective_schedule(run_folder: Path) -> None:
    records = [member.record for member in read_ensemble(EXPERTS[::-1])]  # in any order
    card = protocol_card(records, SampleConfig(sampler="heun", steps=10), dtype="bf16")
    assert card["model"] == "ensemble"
    assert card["fingerprints"] == [record.fingerprint for record in records]
    assert card["ranges"] == [[0, 25], [25, 50], [50, 75], [75, 100]]
    assert (card["steps"], card["forwards"], card["spacing"]) == (10, 19, "linspace")
    assert (card["eta"], card["clip_sample"], card["dtype"]) == (None, True, "bf16")
    assert protocol_card(records, SampleConfig(sampler="dpm++"))["clip_sample"] is None
    assert first_difference(card, {**card, "num": 20, "source": "elsewhere"}) is None
    assert first_difference(card, {**card, "steps": 20}) == "steps"
