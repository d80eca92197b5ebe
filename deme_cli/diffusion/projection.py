"""Channel-wise projection: P(F_t) = W F_t, W in R^{C x C} the identity at the start (section 3.2).

Two placements. `block` is the paper's: one matrix after every down, mid and up block, on the main
path (the skips are taken before it); in a transformer, after every block, on the image tokens. It
cannot be folded into the network everywhere, because every consumer begins with a norm. `fold` puts
matrices only on linear outputs (the convolution of a down- or upsampler; where a block has none,
and in transformers, the ends of the residual branches), so that W K and W b are an ordinary layer
and the trained network is a plain diffusers network. It is another function than the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.backbones.backbone import Backbone, config_of

PREFIX = "channel_projection"


class ChannelProjection(nn.Module):
    """F -> W F over the channels of (B, C, H, W) maps or (..., C) tokens; W starts as identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim == 4:
            return functional.conv2d(features, self.weight[:, :, None, None])
        return functional.linear(features, self.weight)


def has_projections(names: Iterable[str]) -> bool:
    """Whether parameter names include block projections."""
    return any(name.startswith(f"{PREFIX}.") for name in names)


def backbone_of_network(network: nn.Module) -> Backbone:
    """The backbone of a diffusers network, also where FSDP has put a class before its own."""
    classes = [c for c in type(network).__mro__ if c.__module__.startswith("diffusers.")]
    return backbone_of({**config_of(network), "_class_name": classes[0].__name__})


@dataclass(frozen=True)
class Site:
    """A module whose output a channel-wise projection follows.

    `width` is its number of channels; of a module that gives a tuple, `output` says which.
    """

    path: str
    width: int
    output: int = 0


def sites(network: nn.Module, placement: str) -> list[Site]:
    """Where the projections of a placement (`block`, `fold`, `none`) go, in the network's order."""
    if placement == "none":
        return []
    blocks = list(_blocks(network))
    return blocks if placement == "block" else [s for b in blocks for s in _linear_ends(network, b)]


def _blocks(network: nn.Module) -> Iterator[Site]:
    """Every block. A U-Net's down blocks give (h, skips), of which h is projected."""
    backbone, config = backbone_of_network(network), config_of(network)
    if backbone.blocks:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        for name in backbone.blocks:
            for index, _ in enumerate(network.get_submodule(name).children()):
                yield Site(f"{name}.{index}", width, backbone.image_output)
        return
    widths = config["block_out_channels"]
    yield from (Site(f"down_blocks.{index}", width) for index, width in enumerate(widths))
    if network.mid_block is not None:
        yield Site("mid_block", widths[-1])
    yield from (Site(f"up_blocks.{index}", width) for index, width in enumerate(reversed(widths)))


def _linear_ends(network: nn.Module, block: Site) -> Iterator[Site]:
    """The linear layers in a block that a projection of its output can be multiplied into.

    Of a U-Net: its resampling convolution, else the ends of its residual branches; those of its
    transformer blocks end in the proj_out around them. Of a transformer: the ends of attention and
    feed-forward of the image tokens (Flux's single blocks have one branch for both streams).
    """
    inside = dict(network.get_submodule(block.path).named_modules())
    if backbone_of_network(network).blocks:
        ends = [
            name for name, module in inside.items()
            if (name in ("ff.net.2", "ffn.net.2", "proj_out") or name.endswith(".to_out.0"))
            and isinstance(module, nn.Linear)
        ]  # fmt: skip
    else:
        resamplers = ("downsamplers.0.conv", "upsamplers.0.conv")
        ends = [n for n, m in inside.items() if n in resamplers and isinstance(m, nn.Conv2d)]
        branches = (".conv2", ".proj_out", ".to_out.0")
        ends = ends or [
            n for n in inside if n.endswith(branches) and ".transformer_blocks." not in n
        ]
    for name in ends:
        yield Site(f"{block.path}.{name}", inside[name].weight.shape[0])


def attach_projections(network: nn.Module, placement: str) -> None:
    """Add identity projections to `network`, which then owns them as `channel_projection.*`.

    placement: `block`, `fold`, or `none` (which adds nothing).
    """
    places = sites(network, placement)
    if not places:
        return
    projections = {_name(site): ChannelProjection(site.width) for site in places}
    network.add_module(PREFIX, nn.ModuleDict(projections))
    for site in places:
        hook = _ProjectOutput(projections[_name(site)], site.output)
        network.get_submodule(site.path).register_forward_hook(hook)


def _name(site: Site) -> str:
    return site.path.replace(".", "_")


class _ProjectOutput:
    """A forward hook that projects a module's output; of a tuple, only one part."""

    def __init__(self, projection: ChannelProjection, place: int) -> None:
        self.projection, self.place = projection, place

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if not isinstance(output, tuple):
            return self.projection(output)
        parts = list(output)
        parts[self.place] = self.projection(parts[self.place])
        return tuple(parts)


def fold_weights(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """`fold`-placed projections multiplied into the layers they follow: W K and W b.

    weights: the parameters of `network` with its `channel_projection.*`; the result has the names
    of the plain network and gives the same outputs up to rounding (the product is in float64).
    """
    folded = {name: tensor for name, tensor in weights.items() if not has_projections([name])}
    for site in sites(network, "fold"):
        matrix = weights[f"{PREFIX}.{_name(site)}.weight"].double()
        for part in ("weight", "bias"):
            name = f"{site.path}.{part}"
            if name in folded:
                layer = folded[name]
                folded[name] = torch.tensordot(matrix, layer.double(), dims=1).to(layer.dtype)
    return folded
