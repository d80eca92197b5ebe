"""Which experts make an ensemble."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tiny_base, write_tiny_expert

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import SampleConfig
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.sampling.conditioning import protocol_card
from deme_cli.sampling.ensemble import open_ensemble, read_ensemble
from deme_cli.sampling.store import first_difference


def expert_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("ft_*.safetensors"))


def test_the_order_of_the_arguments_does_not_matter(run_folder: Path) -> None:
    paths = expert_paths(run_folder)
    assert read_ensemble(paths[::-1]) == read_ensemble(paths)


def test_a_gap_is_refused_and_says_how_to_close_it(run_folder: Path) -> None:
    paths = expert_paths(run_folder)
    with pytest.raises(ArtifactError, match=r"no expert covers timesteps 25:50.*--range 25:50"):
        read_ensemble([paths[0], *paths[2:]])
    with pytest.raises(ArtifactError, match="no expert covers timesteps 75:100"):
        read_ensemble(paths[:3])


def test_an_overlap_is_refused(run_folder: Path) -> None:
    write_tiny_expert(run_folder / "ft_1of2.safetensors", Path("base.safetensors"), index=1, of=2)
    with pytest.raises(ArtifactError, match="two experts cover timesteps"):
        read_ensemble(expert_paths(run_folder))
    twice = [run_folder / f"ft_{index}of4.safetensors" for index in (1, 1, 2, 3, 4)]
    with pytest.raises(ArtifactError, match="two experts cover timesteps 0:25"):
        read_ensemble(twice)


def test_an_expert_of_another_base_is_refused(run_folder: Path) -> None:
    write_tiny_base(run_folder / "other.safetensors", seed=7)
    path = run_folder / "ft_2of4.safetensors"
    write_tiny_expert(path, run_folder / "other.safetensors", index=2, of=4)
    with pytest.raises(ArtifactError, match=r"ft_2of4\.safetensors: another base than"):
        read_ensemble(expert_paths(run_folder))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model_config": {"dropout": 0.5}}, "model config"),
        ({"companions": {"vae": "0" * 64}}, "set of frozen parts"),
        ({"scheduler_config": {"beta_end": 0.1}}, "scheduler config"),
    ],
)
def test_an_expert_with_other_surroundings_is_refused(
    run_folder: Path, changes: dict[str, dict[str, Any]], fault: str
) -> None:
    path = run_folder / "ft_2of4.safetensors"
    record = read_record(path, "expert")
    changed = {name: {**getattr(record, name), **value} for name, value in changes.items()}
    write_artifact(path, load_tensors(path), replace(record, **changed))
    with pytest.raises(ArtifactError, match=f"another {fault} than"):
        open_ensemble(expert_paths(run_folder))


def test_a_file_that_is_no_expert_is_refused(run_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="expected an artifact of kind 'expert', found 'base'"):
        read_ensemble([run_folder / "base.safetensors"])


def test_a_device_that_does_not_exist_is_refused_before_sampling(run_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--device warp"):
        open_ensemble(expert_paths(run_folder), device="warp")


def test_the_card_names_every_member_and_the_effective_schedule(run_folder: Path) -> None:
    records = [member.record for member in read_ensemble(expert_paths(run_folder))]
    card = protocol_card(records, SampleConfig(sampler="heun", steps=10), dtype="bf16")
    assert card["model"] == "ensemble"
    assert card["fingerprints"] == [record.fingerprint for record in records]
    assert card["ranges"] == [[0, 25], [25, 50], [50, 75], [75, 100]]
    assert (card["steps"], card["forwards"], card["spacing"]) == (10, 19, "linspace")
    assert (card["eta"], card["clip_sample"], card["dtype"]) == (None, True, "bf16")
    assert protocol_card(records, SampleConfig(sampler="dpm++"))["clip_sample"] is None


def test_cards_differ_where_images_do() -> None:
    card = {"seed": 0, "steps": 50, "num": 10, "source": "digits"}
    assert first_difference(card, {**card, "num": 20, "source": "elsewhere"}) is None
    assert first_difference(card, {**card, "steps": 20}) == "steps"
    assert first_difference(card, {"seed": 0, "num": 10}) == "steps"
