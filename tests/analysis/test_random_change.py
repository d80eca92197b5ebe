"""Random weight changes: as large as an expert's in every tensor, and the same whatever else is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deme_cli.analysis.activations.random_change import randomly_changed
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.diffusion.projection import PREFIX, attach_projections

PROJECTION = f"{PREFIX}.mid_block.weight"


@pytest.fixture
def base(finished_run: Path) -> nn.Module:
    return load_denoiser(finished_run / "base.safetensors").network


@pytest.fixture
def expert(finished_run: Path) -> nn.Module:
    """With a projection away from the identity after its middle."""
    network = load_denoiser(finished_run / "ft_2of4.safetensors").network
    attach_projections(network, "block")
    network.state_dict()[PROJECTION][0, 1] = 0.5
    return network


def changes(network: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    before = base.state_dict()
    return {
        name: tensor - (before[name] if name in before else torch.eye(len(tensor)))
        for name, tensor in network.state_dict().items()
    }


def test_every_tensor_moves_as_far_as_the_expert_moved_it(
    base: nn.Module, expert: nn.Module
) -> None:
    before = copy.deepcopy(expert.state_dict())
    found = changes(randomly_changed(base, expert, seed=0, k=1), base)
    expected = changes(expert, base)
    assert list(found) == list(expected)
    for name, change in expected.items():
        assert float(found[name].norm()) == pytest.approx(float(change.norm()), rel=1e-3, abs=1e-9)
    moved = found[PROJECTION]
    assert float(moved.norm()) == pytest.approx(0.5)
    assert (moved != 0).all()  # noise, not the expert's own direction
    assert all(torch.equal(before[name], own) for name, own in expert.state_dict().items())


def test_its_noise_depends_on_seed_number_and_name_alone(
    base: nn.Module, expert: nn.Module
) -> None:
    first = changes(randomly_changed(base, expert, seed=0, k=1), base)
    name, *others = (name for name, change in first.items() if change.norm() > 0)
    again = copy.deepcopy(expert)
    again.state_dict()[name].mul_(1.1)
    after = changes(randomly_changed(base, again, seed=0, k=1), base)
    assert not torch.equal(after[name], first[name])
    assert all(torch.equal(after[other], first[other]) for other in others)
    for seed, k in ((0, 2), (1, 1)):
        other = changes(randomly_changed(base, expert, seed=seed, k=k), base)
        cosine = torch.cosine_similarity(other[name].flatten(), first[name].flatten(), dim=0)
        assert abs(float(cosine)) < 0.5


def test_projections_are_applied_whichever_network_has_them(
    base: nn.Module, expert: nn.Module
) -> None:
    x_t, t = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3])
    changed = randomly_changed(expert, base, seed=0, k=1)  # the base has them, the expert has none
    assert float((changed.state_dict()[PROJECTION] - expert.state_dict()[PROJECTION]).norm()) == (
        pytest.approx(0.5)
    )
    before = predict(changed, x_t, t)
    changed.state_dict()[PROJECTION].mul_(2)
    assert not torch.equal(predict(changed, x_t, t), before)
