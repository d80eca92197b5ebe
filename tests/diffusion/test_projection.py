"""Projections start as the identity, count as in the paper, and fold into a plain network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from deme_cli.diffusion.denoiser import build_network, predict
from deme_cli.diffusion.projection import (
    PREFIX,
    attach_projections,
    fold_weights,
    sites,
)

CIFAR10 = {
    "_class_name": "UNet2DModel", "sample_size": 32, "in_channels": 3, "out_channels": 3,
    "block_out_channels": [128, 256, 256, 256], "layers_per_block": 2, "downsample_padding": 0,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "attention_head_dim": None,
}  # fmt: skip
LSUN = {
    **CIFAR10, "sample_size": 256, "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}  # fmt: skip
STABLE_DIFFUSION = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3], "cross_attention_dim": 768,
}  # fmt: skip
SKIP_BLOCKS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64],  # these blocks fix their own number of groups
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
    "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
}
NETWORKS: dict[str, dict[str, Any]] = {
    "attention": {},
    "three levels": {
        "block_out_channels": [8, 16, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
    },
    "resnet resamplers": {
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "skips": SKIP_BLOCKS,
    "no attention": {
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "add_attention": False,
        "downsample_padding": 0,
    },
    "no middle": {"mid_block_type": None},
}


def network_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_network({**TINY_MODEL, **NETWORKS[name]}).eval().requires_grad_(False)


def outputs(network: nn.Module) -> torch.Tensor:
    parameter = next(network.parameters())
    generator = torch.Generator().manual_seed(1)
    channels = network.config.in_channels
    x_t = torch.randn(3, channels, 8, 8, generator=generator).to(parameter.dtype)
    return predict(network, x_t, torch.tensor([0, 40, 99]))


def make_random(network: nn.Module) -> None:
    """Give every projection a random matrix around the identity."""
    generator = torch.Generator().manual_seed(2)
    for projection in network.get_submodule(PREFIX).values():
        noise = torch.randn(projection.weight.shape, generator=generator)
        projection.weight.data.add_(0.3 * noise.to(projection.weight))


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("network_class", "config", "plain", "matrices", "projected"),
    [
        (UNet2DModel, CIFAR10, 35_746_307, 9, 491_520),
        (UNet2DModel, LSUN, 113_673_219, 13, 1_638_400),
        (UNet2DConditionModel, STABLE_DIFFUSION, 859_520_964, 9, 9_216_000),
    ],
    ids=["cifar10", "lsun", "stable-diffusion"],
)
def test_block_projections_have_the_sizes_of_the_paper(
    network_class: type, config: dict[str, Any], plain: int, matrices: int, projected: int
) -> None:
    with torch.device("meta"):
        network = network_class.from_config(config)
        assert num_parameters(network) == plain
        attach_projections(network, "block")
    assert len(network.get_submodule(PREFIX)) == matrices
    assert num_parameters(network) - plain == projected


@pytest.mark.parametrize("placement", ["block", "fold"])
@pytest.mark.parametrize("name", NETWORKS)
def test_projections_begin_as_the_identity_and_gradients_reach_each(
    name: str, placement: str
) -> None:
    network = network_of(name)
    before = outputs(network)
    attach_projections(network, "none")
    assert torch.equal(outputs(network), before)
    attach_projections(network, placement)
    torch.testing.assert_close(outputs(network), before, rtol=0, atol=1e-6)
    twin = copy.deepcopy(network)
    make_random(twin)  # a copy owns its projections
    assert (outputs(twin) - before).abs().max() > 1e-3
    network.requires_grad_(True)
    outputs(network).square().sum().backward()
    for path, projection in network.get_submodule(PREFIX).items():
        assert projection.weight.grad.abs().sum() > 0, path
    torch.testing.assert_close(outputs(network).detach(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [*((name, torch.float32, 1e-5) for name in NETWORKS), ("attention", torch.float64, 1e-12)],
)
def test_folded_equals_unfolded(name: str, dtype: torch.dtype, tolerance: float) -> None:
    plain = network_of(name).to(dtype)
    projected = copy.deepcopy(plain)
    attach_projections(projected, "fold")
    projected.to(dtype)
    make_random(projected)
    folded = fold_weights(projected.state_dict(), plain)
    assert folded.keys() == plain.state_dict().keys()
    plain.load_state_dict(folded)
    torch.testing.assert_close(outputs(plain), outputs(projected), rtol=0, atol=tolerance)


def test_projections_follow_blocks_and_the_linear_ends_within_them() -> None:
    unet = build_network({**TINY_MODEL, "layers_per_block": 1})
    blocks = [(site.path, site.width, site.output) for site in sites(unet, "block")]
    names = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    assert blocks == list(zip(names, (8, 16, 16, 16, 8), (0,) * 5, strict=True))
    ends = [(site.path, site.width) for site in sites(unet, "fold")]
    assert ends[0] == ("down_blocks.0.downsamplers.0.conv", 8)  # instead of its branches
    assert [path for path, _ in ends if path.startswith("down_blocks.1")] == [
        "down_blocks.1.attentions.0.to_out.0", "down_blocks.1.resnets.0.conv2",
    ]  # fmt: skip
    dit = build_network({
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 4,
        "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8,
        "num_embeds_ada_norm": 10,
    })  # fmt: skip
    assert [(site.path, site.width) for site in sites(dit, "block")] == [
        ("transformer_blocks.0", 8), ("transformer_blocks.1", 8),
    ]  # fmt: skip
    assert [(site.path, site.width) for site in sites(dit, "fold")] == [
        (f"transformer_blocks.{n}.{end}", 8)
        for n in range(2)
        for end in ("attn1.to_out.0", "ff.net.2")
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_carries_a_projection_in_both_placements(name: str) -> None:
    network = network_of(name)
    folded = [site.path for site in sites(network, "fold")]
    for block in (site.path for site in sites(network, "block")):
        assert any(site.startswith(f"{block}.") for site in folded), block
