"""Compiled steps: nothing is compiled twice, and images change by rounding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import collect_images, largest_difference, write_tiny_expert
from torch import nn

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import SampleConfig
from deme_cli.diffusion.denoiser import build_network, load_denoiser
from deme_cli.diffusion.projection import attach_projections, has_projections
from deme_cli.sampling import sampler as sampler_module
from deme_cli.sampling.ensemble import open_ensemble, single
from deme_cli.sampling.sampler import CompiledSteps

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")


@pytest.fixture
def compiled_ones(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The steps that are compiled where it is on; calls stay plain, so that it takes no time."""
    found: list[nn.Module] = []

    def compile(step: nn.Module) -> None:
        found.append(step)
        step._compiled_call_impl = step._call_impl

    monkeypatch.setattr(sampler_module, "is_compiled", lambda device, how, **_: how == "on")
    monkeypatch.setattr(nn.Module, "compile", compile)
    return found


def test_what_is_carried_keeps_its_own_weights(run_folder: Path, compiled_ones) -> None:
    one, other = (load_denoiser(run_folder / f"ft_{i}of4.safetensors") for i in (1, 2))
    compiled = CompiledSteps("on", num_forwards=1, num_loads=2)
    before = [p.clone() for p in one.network.parameters()]
    network = compiled.carry(one).denoiser.network
    assert compiled.carry(other).denoiser.network is network is not one.network
    pairs = zip(network.parameters(), other.network.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert all(map(torch.equal, one.network.parameters(), before))
    assert len(compiled_ones) == 1


def test_a_single_model_is_compiled_itself_and_off_leaves_it_alone(
    run_folder: Path, compiled_ones
) -> None:
    denoiser = load_denoiser(run_folder / "base.safetensors")
    for how in ("off", "auto", "on"):
        assert not compiled_ones
        found = CompiledSteps(how, num_forwards=9, num_loads=9 if how != "on" else 1).carry(
            denoiser
        )
        assert found.denoiser.network is found.network is denoiser.network
    assert compiled_ones == [found]


def add_projections(path: Path) -> None:
    """Block projections that change nothing."""
    record, weights = read_record(path, "expert"), load_tensors(path)
    network = build_network(record.model_config)
    attach_projections(network, "block")
    projections = {name: w for name, w in network.state_dict().items() if has_projections([name])}
    write_artifact(path, {**weights, **projections}, replace(record, projection="block"))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_experts_take_turns_in_one_network_another_structure_has_its_own(
    run_folder: Path, compiled_ones, sampler: str
) -> None:
    """The last batch is filled up to the size of the others, and draws the same images."""
    paths = sorted(run_folder.glob("ft_*.safetensors"))
    config = SampleConfig(num=3, steps=4, batch_size=2, sampler=sampler, spacing="linspace")
    plain = collect_images(open_ensemble(paths), config)
    for num_networks in (1, 2):
        compiled = CompiledSteps("on", num_forwards=1, num_loads=4)
        found = collect_images(open_ensemble(paths), config, compiled=compiled)
        assert largest_difference(found, plain) <= 1
        assert (found != plain).mean() < 0.02
        assert len(compiled_ones) == num_networks
        compiled_ones.clear()
        add_projections(paths[1])


@pytest.mark.parametrize("name", ["dit", "sdxl"])
def test_what_fills_up_a_batch_is_told_what_its_last_image_shows(
    opened, conditioning_for, compiled_ones, name: str
) -> None:
    about = {"guidance": 1.0} if name == "dit" else {"guidance": 3.0, "prompts": "text:a red cat"}
    config = SampleConfig(num=3, steps=4, batch_size=2, sampler="ddpm", **about)
    shown = {"conditioning": conditioning_for(opened(name), config)}
    plain = collect_images(single(opened(name)), config, **shown)
    sizes: list[int] = []
    hook = opened(name).network.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    compiled = CompiledSteps("on", num_forwards=1, num_loads=1)
    found = collect_images(single(opened(name)), config, compiled=compiled, **shown)
    hook.remove()
    assert set(sizes) == ({2} if name == "dit" else {4})
    assert largest_difference(found, plain) <= 1


@pytest.mark.slow
@needs_compiler
def test_an_ensemble_is_compiled_once(run_folder: Path) -> None:
    from torch._dynamo.utils import counters

    for index in range(1, 5):  # far apart, so that weights in the wrong place would show
        path = run_folder / f"ft_{index}of4.safetensors"
        write_tiny_expert(path, run_folder / "base.safetensors", index=index, of=4, scale=0.2)
    experts = open_ensemble(sorted(run_folder.glob("ft_*.safetensors")))
    config = SampleConfig(num=11, steps=8, batch_size=4, sampler="dpm++")
    plain = collect_images(experts, config)
    compiled = CompiledSteps("on", num_forwards=1, num_loads=4)
    assert compiled.is_on(torch.device("cpu"))
    counters.clear()
    apart = np.abs(collect_images(experts, config, compiled=compiled).astype(int) - plain)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.01
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@needs_compiler
def test_guidance_is_compiled_with_the_network(opened) -> None:
    from torch._dynamo.utils import counters

    denoiser = opened("sd")
    about = {"prompts": "text:a red cat", "guidance": 3.0, "sampler": "euler"}
    config = SampleConfig(num=5, steps=5, batch_size=2, **about)
    compiled = CompiledSteps("on", num_forwards=1, num_loads=1)
    counters.clear()
    found = collect_images(single(denoiser), config, compiled=compiled)
    assert counters["stats"]["unique_graphs"] == 1
    assert largest_difference(found, collect_images(single(denoiser), config)) <= 1
