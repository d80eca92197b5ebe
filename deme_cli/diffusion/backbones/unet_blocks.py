"""Where a U-Net's channel-wise projections go: down, mid and up blocks of diffusers' UNets."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from deme_cli.diffusion.backbones.backbone import Site, config_of

_BRANCHES = (".conv2", ".proj_out", ".to_out.0")  # ends of residual branches
_INSIDE = ".transformer_blocks."  # its branches end in the proj_out around them


def unet_block_sites(network: nn.Module) -> Iterator[Site]:
    """Every down, mid and up block; a down block gives (h, skips), of which h is projected."""
    widths = config_of(network)["block_out_channels"]
    for index, width in enumerate(widths):
        yield Site(f"down_blocks.{index}", width)
    if network.mid_block is not None:
        yield Site("mid_block", widths[-1])
    for index, width in enumerate(reversed(widths)):
        yield Site(f"up_blocks.{index}", width)


def unet_fold_sites(network: nn.Module) -> Iterator[Site]:
    """A block's resampling convolution; where it has none, the ends of its residual branches."""
    for block in unet_block_sites(network):
        module = network.get_submodule(block.path)
        inside = dict(module.named_modules())
        resamplers = [
            name for name in inside
            if name in ("downsamplers.0.conv", "upsamplers.0.conv")
            and isinstance(inside[name], nn.Conv2d)
        ]  # fmt: skip
        branches = [n for n in inside if n.endswith(_BRANCHES) and _INSIDE not in n]
        for name in resamplers or branches:
            yield Site(f"{block.path}.{name}", inside[name].weight.shape[0])
