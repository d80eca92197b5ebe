"""Compiled steps: nothing is compiled twice, and images change by rounding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_expert
from torch import nn

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import SampleConfig
from deme_cli.diffusion.denoiser import build_network, load_denoiser
from deme_cli.diffusion.projection import attach_projections, has_projections
from deme_cli.sampling import compiled as compiled_module
from deme_cli.sampling.compiled import CompiledSteps
from deme_cli.sampling.ensemble import SamplingExpert, open_ensemble, single
from deme_cli.sampling.sampler import ImageBatch, collect_images, sample_images


def images_of(experts: list[SamplingExpert], config: SampleConfig, **options: object) -> np.ndarray:
    records = sample_images(experts, config, **options)
    return np.concatenate([record.images for record in records if isinstance(record, ImageBatch)])


@pytest.fixture
def compiled_ones(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The steps that are compiled where it is on; calls stay plain, so that it takes no time."""
    found: list[nn.Module] = []

    def compile(step: nn.Module) -> None:
        found.append(step)
        step._compiled_call_impl = step._call_impl

    monkeypatch.setattr(compiled_module, "is_compiled", lambda device, how, **_: how == "on")
    monkeypatch.setattr(nn.Module, "compile", compile)
    return found


def test_experts_take_turns_in_one_network(run_folder: Path, compiled_ones) -> None:
    experts = open_ensemble(sorted(run_folder.glob("ft_*.safetensors")))
    config = SampleConfig(num=3, steps=4, batch_size=2, spacing="linspace")
    compiled = CompiledSteps("on", num_forwards=1, num_loads=4)
    plain = collect_images(experts, config)
    for hold_one in (False, True):  # the second time, weights of the last expert lie in it
        found = images_of(experts, config, hold_one=hold_one, compiled=compiled)
        assert np.array_equal(found[:2], plain[:2])
        assert np.abs(found.astype(int) - plain).max() <= 1  # the last is filled up to two
    assert len(compiled_ones) == 1


def test_what_is_carried_keeps_its_own_weights(run_folder: Path, compiled_ones) -> None:
    one, other = (load_denoiser(run_folder / f"ft_{i}of4.safetensors") for i in (1, 2))
    compiled = CompiledSteps("on", num_forwards=1, num_loads=2)
    before = [p.clone() for p in one.network.parameters()]
    network = compiled.carry(one).denoiser.network
    assert compiled.carry(other).denoiser.network is network is not one.network
    pairs = zip(network.parameters(), other.network.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert all(map(torch.equal, one.network.parameters(), before))


def test_a_single_model_is_compiled_itself_and_off_leaves_it_alone(
    run_folder: Path, compiled_ones
) -> None:
    denoiser = load_denoiser(run_folder / "base.safetensors")
    for how in ("off", "auto"):
        compiled = CompiledSteps(how, num_forwards=9, num_loads=9)
        assert compiled.carry(denoiser).denoiser is denoiser
    assert not compiled_ones
    found = CompiledSteps("on", num_forwards=1, num_loads=1).carry(denoiser)
    assert found.denoiser.network is found.network is denoiser.network
    assert compiled_ones == [found]


def with_projections(folder: Path) -> Path:
    """The second expert with block projections that change nothing."""
    path = folder / "ft_2of4.safetensors"
    record, weights = read_record(path, "expert"), load_tensors(path)
    network = build_network(record.model_config)
    attach_projections(network, "block")
    projections = {name: w for name, w in network.state_dict().items() if has_projections([name])}
    write_artifact(path, {**weights, **projections}, replace(record, projection="block"))
    return path


def test_an_expert_of_another_structure_has_a_network_of_its_own(
    run_folder: Path, compiled_ones
) -> None:
    paths = sorted(run_folder.glob("ft_*.safetensors"))
    config = SampleConfig(num=2, steps=4, spacing="linspace")
    plain = collect_images(open_ensemble(paths), config)
    with_projections(run_folder)
    compiled = CompiledSteps("on", num_forwards=1, num_loads=4)
    found = images_of(open_ensemble(paths), config, compiled=compiled)
    assert np.abs(found.astype(int) - plain).max() <= 1
    assert len(compiled_ones) == 2


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.5), ("ddpm", 0), ("dpm++", 0)])
def test_batches_that_are_filled_up_draw_the_same_images(
    run_folder: Path, compiled_ones, sampler: str, eta: float
) -> None:
    experts = open_ensemble(sorted(run_folder.glob("ft_*.safetensors")))
    config = SampleConfig(num=5, steps=6, batch_size=3, sampler=sampler, eta=eta)
    plain = collect_images(experts, config)
    compiled = CompiledSteps("on", num_forwards=1, num_loads=4)
    found = images_of(experts, config, compiled=compiled)
    assert np.abs(found.astype(int) - plain).max() <= 1
    assert (found != plain).mean() < 0.02


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_an_ensemble_is_compiled_once(run_folder: Path, sampler: str) -> None:
    from torch._dynamo.utils import counters

    for index in range(1, 5):  # far apart, so that weights in the wrong place would show
        path = run_folder / f"ft_{index}of4.safetensors"
        write_tiny_expert(path, run_folder / "base.safetensors", index=index, of=4, scale=0.2)
    experts = open_ensemble(sorted(run_folder.glob("ft_*.safetensors")))
    config = SampleConfig(num=11, steps=8, batch_size=4, sampler=sampler)
    plain = collect_images(experts, config)
    compiled = CompiledSteps("on", num_forwards=1, num_loads=4)
    assert compiled.is_on(torch.device("cpu"))
    counters.clear()
    for hold_one in (False, True):
        found = images_of(experts, config, hold_one=hold_one, compiled=compiled)
        apart = np.abs(found.astype(int) - plain)
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.01
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_guidance_is_compiled_with_the_network(opened, sampler: str) -> None:
    from torch._dynamo.utils import counters

    denoiser = opened("sd")
    about = {"prompts": "text:a red cat", "guidance": 3.0, "sampler": sampler}
    config = SampleConfig(num=5, steps=5, batch_size=2, **about)
    compiled = CompiledSteps("on", num_forwards=1, num_loads=1)
    assert compiled.is_on(denoiser.device)
    counters.clear()
    found = images_of(single(denoiser), config, compiled=compiled)
    assert counters["stats"]["unique_graphs"] == 1
    assert np.abs(found.astype(int) - collect_images(single(denoiser), config)).max() <= 1
