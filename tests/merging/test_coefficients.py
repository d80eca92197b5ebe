"""Coefficients by tensor: which group a tensor is in, and globs that must match one."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import TINY_MODEL
from torch import nn

from deme_cli.diffusion.denoiser import build_network
from deme_cli.errors import ConfigError
from deme_cli.merging.coefficients import Coefficients, block_name, groups_of, require_matches

TEXT_MODEL = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 8, "cross_attention_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 4, "out_channels": 8,
    "num_layers": 11, "num_attention_heads": 1, "attention_head_dim": 8, "norm_num_groups": 4,
    "num_embeds_ada_norm": 10,
}  # fmt: skip


@pytest.fixture(scope="module", params=[TINY_MODEL, TEXT_MODEL, TRANSFORMER],
                ids=["unet", "text-unet", "dit"])  # fmt: skip
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return build_network(request.param)


def numbered(groups: list[str]) -> Coefficients:
    """Group i has the coefficient i, what is in none -1."""
    return Coefficients((-1.0,), {glob: (float(i),) for i, glob in enumerate(groups)})


def test_every_tensor_is_in_the_group_of_its_block(network: nn.Module) -> None:
    names = list(network.state_dict())
    groups = groups_of(names, "block")
    coefficients = numbered(groups)
    members: dict[str, list[str]] = {glob: [] for glob in [*groups, "*"]}
    for name in names:
        number = int(coefficients.of(name)[0])
        members["*" if number < 0 else groups[number]].append(name)
    for glob in groups:
        prefix = glob.removesuffix("*")
        assert members[glob] == [name for name in names if name.startswith(prefix)] != []
    blocks = ("down_blocks.", "up_blocks.", "mid_block.", "transformer_blocks.")
    assert members["*"] == [name for name in names if not name.startswith(blocks)] != []
    inside = [module for module, _ in network.named_children() if f"{module}." in blocks]
    lists = [getattr(network, module) for module in inside]
    assert len(groups) == sum(len(one) if isinstance(one, nn.ModuleList) else 1 for one in lists)


def test_a_layer_has_the_tensors_of_its_own_module_alone(network: nn.Module) -> None:
    names = list(network.state_dict())
    groups = groups_of(names, "layer")
    coefficients = numbered(groups)
    owners = {}
    for path, module in network.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, _ in own:
            owners[f"{path}.{name}" if path else name] = path
    seen: dict[str, str] = {}
    for name in names:
        number = int(coefficients.of(name)[0])
        assert number >= 0, f"{name} is in no group"
        assert seen.setdefault(groups[number], owners[name]) == owners[name]
    assert len(set(seen.values())) == len(seen) == len(groups)


def test_the_whole_model_has_no_groups(network: nn.Module) -> None:
    assert groups_of(network.state_dict(), "model") == []


def test_blocks_are_found_by_name() -> None:
    assert {name: block_name(name) for name in (
        "down_blocks.10.resnets.0.conv1.weight", "mid_block.attentions.0.to_q.weight",
        "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_q.weight",
        "transformer_blocks.3.attn.to_q.weight", "single_transformer_blocks.12.proj_mlp.bias",
        "joint_transformer_blocks.0.x", "conv_in.weight", "time_embedding.linear_1.weight",
        "channel_projection.mid_block.weight", "pos_embed", "down_blocks", "mid_blocks.weight",
    )} == {
        "down_blocks.10.resnets.0.conv1.weight": "down_blocks.10",
        "mid_block.attentions.0.to_q.weight": "mid_block",
        "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_q.weight": "up_blocks.3",
        "transformer_blocks.3.attn.to_q.weight": "transformer_blocks.3",
        "single_transformer_blocks.12.proj_mlp.bias": "single_transformer_blocks.12",
        "joint_transformer_blocks.0.x": "joint_transformer_blocks.0", "conv_in.weight": None,
        "time_embedding.linear_1.weight": None, "channel_projection.mid_block.weight": None,
        "pos_embed": None, "down_blocks": None, "mid_blocks.weight": None,
    }  # fmt: skip


def test_blocks_one_and_ten_are_two_and_sorted_as_numbers() -> None:
    names = [f"transformer_blocks.{i}.attn.weight" for i in (10, 2, 1)]
    groups = groups_of(names, "block")
    assert groups == [f"transformer_blocks.{i}.*" for i in (1, 2, 10)]
    assert [numbered(groups).of(name) for name in names] == [(2.0,), (1.0,), (0.0,)]


def test_a_module_within_a_module_keeps_its_own_layer() -> None:
    names = ["a.weight", "a.b.weight", "a.b.c.weight", "a.b.c.bias", "scale", "scale.x.weight"]
    groups = groups_of(names, "layer")
    assert groups.index("a.b.c.*") < groups.index("a.b.*") < groups.index("a.*")
    found = [groups[int(numbered(groups).of(name)[0])] for name in names]
    assert found == ["a.*", "a.b.*", "a.b.c.*", "a.b.c.*", "scale", "scale.x.*"]


def test_the_first_glob_that_matches_decides() -> None:
    coefficients = Coefficients((0.0,), {"*.bias": (1.0,), "mid_block.*": (2.0,), "*": (3.0,)})
    assert coefficients.of("mid_block.a.bias") == (1.0,)
    assert coefficients.of("mid_block.a.weight") == (2.0,)
    assert coefficients.of("conv_in.weight") == (3.0,)
    assert Coefficients((0.5,), {"Mid_*": (1.0,)}).of("mid_block.a") == (0.5,), "case counts"


@pytest.mark.parametrize(
    ("values", "finer", "words"),
    [
        ((1.0, math.nan), {}, "expected finite numbers"),
        ((1.0, 0.0), {"a": (math.inf, 0.0)}, "expected finite numbers"),
        ((1.0, 0.0), {"a": (1.0,)}, "1 coefficients where there are 2 experts"),
    ],
)
def test_coefficients_that_make_no_sense_are_refused(
    values: tuple, finer: dict, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Coefficients(values, finer)


@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("midblock.*", "mid_block.*"),
        ("down_block.0.*", "down_blocks.0.*"),
        ("up_blocks.7.*", "up_blocks.1.*"),
        ("conv_inn.*", "conv_in.*"),
        ("MID_BLOCK.*", ""),
        ("conv_in", "conv_in.*"),
        ("?", ""),
        ("", ""),
    ],
)
def test_a_glob_that_matches_nothing_is_told_with_near_names(glob: str, near: str) -> None:
    names = list(build_network(TINY_MODEL).state_dict())
    require_matches(["conv_in.*", "*", "*.weight", "conv_in.weight", "mid_block.*"], names)
    with pytest.raises(ConfigError) as caught:
        require_matches(["mid_block.*", glob], names)
    message = str(caught.value)
    assert message.startswith(f"{glob!r} matches no tensor of this model; near names: ")
    offered = message.split("near names: ")[1].split(", ")
    assert 1 <= len(offered) <= 3
    assert near in message
    for name in offered:
        require_matches([name], names)
