"""Coefficients by tensor, and the space that a search varies."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import TINY_MODEL
from torch import nn

from deme_cli.diffusion.denoiser import build_network
from deme_cli.errors import ConfigError
from deme_cli.merging.coefficients import (
    Coefficients,
    Space,
    block_name,
    grid_points,
    groups_of,
    require_matches,
    resolve_grid,
)

TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 4, "out_channels": 8,
    "num_layers": 11, "num_attention_heads": 1, "attention_head_dim": 8, "norm_num_groups": 4,
    "num_embeds_ada_norm": 10,
}  # fmt: skip
EXPERTS = ("1of3", "2of3", "3of3")
BOUNDS = ((-0.5, 1.5), (0.0, 1.0), (-2.0, 2.0))
START = (0.25, 0.5, -1.0)
WHOLE = Space(EXPERTS, BOUNDS, START)
PARTS = Space(
    EXPERTS, BOUNDS, START, ("down_blocks.0.*", "mid_block.*"), fixed={"*.bias": (1.0, 0.0, 0.0)}
)
CLOSED = Space(EXPERTS, BOUNDS, START, ("a.*", "b.*"), has_rest=False)


@pytest.fixture(scope="module", params=[TINY_MODEL, TRANSFORMER], ids=["unet", "dit"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return build_network(request.param)


def numbered(groups: list[str]) -> Coefficients:
    """Group i has the coefficient i, what is in none -1."""
    return Coefficients((-1.0,), {glob: (float(i),) for i, glob in enumerate(groups)})


def test_every_tensor_is_in_the_group_of_its_block(network: nn.Module) -> None:
    names = list(network.state_dict())
    groups = groups_of(names, "block")
    members: dict[str, list[str]] = {glob: [] for glob in [*groups, "*"]}
    for name in names:
        number = int(numbered(groups).of(name)[0])
        members["*" if number < 0 else groups[number]].append(name)
    for glob in groups:
        prefix = glob.removesuffix("*")
        assert members[glob] == [name for name in names if name.startswith(prefix)] != []
    blocks = ("down_blocks.", "up_blocks.", "mid_block.", "transformer_blocks.")
    assert members["*"] == [name for name in names if not name.startswith(blocks)] != []
    inside = [
        getattr(network, part) for part, _ in network.named_children() if f"{part}." in blocks
    ]
    assert len(groups) == sum(len(b) if isinstance(b, nn.ModuleList) else 1 for b in inside)


def test_a_layer_has_the_tensors_of_its_own_module_alone(network: nn.Module) -> None:
    groups = groups_of(network.state_dict(), "layer")
    coefficients = numbered(groups)
    seen: dict[str, str] = {}
    for name in network.state_dict():
        number = int(coefficients.of(name)[0])
        assert number >= 0, f"{name} is in no group"
        owner = name.rpartition(".")[0]
        assert seen.setdefault(groups[number], owner) == owner
    assert len(set(seen.values())) == len(seen) == len(groups)


def test_blocks_are_found_by_name_and_sorted_as_numbers() -> None:
    for name, block in {
        "down_blocks.10.resnets.0.conv1.weight": "down_blocks.10",
        "mid_block.attentions.0.to_q.weight": "mid_block",
        "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_q.weight": "up_blocks.3",
        "single_transformer_blocks.12.proj_mlp.bias": "single_transformer_blocks.12",
        "joint_transformer_blocks.0.x": "joint_transformer_blocks.0", "blocks.29.x": "blocks.29",
        "conv_in.weight": None, "channel_projection.mid_block.weight": None, "pos_embed": None,
        "down_blocks": None, "mid_blocks.weight": None,
    }.items():  # fmt: skip
        assert block_name(name) == block
    names = [f"transformer_blocks.{i}.attn.weight" for i in (10, 2, 1)]
    groups = groups_of(names, "block")
    assert groups == [f"transformer_blocks.{i}.*" for i in (1, 2, 10)]
    assert [numbered(groups).of(name) for name in names] == [(2.0,), (1.0,), (0.0,)]
    assert groups_of(names, "model") == []


def test_a_module_within_a_module_keeps_its_own_layer() -> None:
    names = ["a.weight", "a.b.weight", "a.b.c.weight", "a.b.c.bias", "scale", "scale.x.weight"]
    groups = groups_of(names, "layer")
    found = [groups[int(numbered(groups).of(name)[0])] for name in names]
    assert found == ["a.*", "a.b.*", "a.b.c.*", "a.b.c.*", "scale", "scale.x.*"]


def test_the_first_glob_that_matches_decides() -> None:
    coefficients = Coefficients((0.0,), {"*.bias": (1.0,), "mid_block.*": (2.0,), "*": (3.0,)})
    assert coefficients.of("mid_block.a.bias") == (1.0,)
    assert coefficients.of("mid_block.a.weight") == (2.0,)
    assert coefficients.of("conv_in.weight") == (3.0,)
    assert Coefficients((0.5,), {"Mid_*": (1.0,)}).of("mid_block.a") == (0.5,), "case counts"


@pytest.mark.parametrize(
    ("glob", "near"),
    [("midblock.*", "mid_block.*"), ("conv_in", "conv_in.*"), ("", "")],
)
def test_a_glob_that_matches_nothing_is_told_with_near_names(glob: str, near: str) -> None:
    names = list(build_network(TINY_MODEL).state_dict())
    with pytest.raises(ConfigError) as caught:
        require_matches(["conv_in.*", "*", "conv_in.weight", glob], names)
    message = str(caught.value)
    assert message.startswith(f"{glob!r} matches no tensor of this model; near names: ")
    offered = message.split("near names: ")[1].split(", ")
    assert 1 <= len(offered) <= 3
    assert near in message
    require_matches(offered, names)


@pytest.mark.parametrize("space", [WHOLE, PARTS, CLOSED], ids=["whole", "parts", "closed"])
def test_every_number_of_a_point_has_a_name_bounds_and_a_group(space: Space) -> None:
    count = 3 * len(space.all_groups)
    assert len(space.labels) == len(set(space.labels)) == len(space.box) == count
    point, start = tuple(float(i) for i in range(count)), space.everywhere(START)
    found = space.coefficients(point)
    for index, (label, pair) in enumerate(zip(space.labels, space.box, strict=True)):
        expert, group = EXPERTS.index(label.split(" ")[0]), label.partition(" ")[2]
        assert (pair, start[index]) == (BOUNDS[expert], START[expert])
        values = found.finer[group] if group not in ("", "*") else found.values
        assert values[expert] == point[index]
    assert space.summary(start) == pytest.approx(START)


def test_what_is_fixed_is_decided_first_and_without_a_rest_the_mean_is_shown() -> None:
    found = PARTS.coefficients(tuple(float(i) for i in range(9)))
    assert found.of("mid_block.conv.weight") == (3.0, 4.0, 5.0)
    assert found.of("mid_block.conv.bias") == (1.0, 0.0, 0.0)
    assert found.of("conv_in.weight") == found.values == (6.0, 7.0, 8.0)
    assert CLOSED.coefficients((1.0, 0.0, 0.0, 0.0, 1.0, 0.0)).values == (0.5, 0.5, 0.0)


def test_the_points_of_a_grid_are_all_combinations_and_the_default_is_affordable() -> None:
    grid = resolve_grid([[1, 0, 0.5], [0.25, 0.25]], 2)
    assert grid == ((0.0, 0.5, 1.0), (0.25,))
    assert grid_points(grid) == list(itertools.product(*grid))
    assert grid_points(grid, 2) == list(itertools.product(*grid, *grid))
    sizes = [len(grid_points(resolve_grid(None, count))) for count in range(1, 9)]
    assert sizes == [3, 9, 27, 81, 32, 64, 128, 256]
    with pytest.raises(ConfigError, match="9 experts make 512 candidates"):
        resolve_grid(None, 9)
    for values in ([], [0, "a"], [0, math.nan], [[0, 1], 2], [[0, 1], []], [True]):
        with pytest.raises(ConfigError, match="expected a list of finite numbers"):
            resolve_grid(values, 2)
