"""Channel-wise projection: P(F_t) = W F_t, W in R^{C x C} the identity at the start (section 3.2).

Two placements. `block` is the paper's: one matrix after every down, mid and up block, on the main
path (the skips are taken before it); in a transformer, after every block, on the image tokens. It
cannot be folded into the network everywhere, because every consumer begins with a norm. `fold` puts
matrices only on linear outputs (the convolution of a down- or upsampler; where a block has none,
and in transformers, the ends of the residual branches), so that W K and W b are an ordinary layer
and the trained network is a plain diffusers network. It is another function than the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from deme_cli.diffusion.backbones.backbone import Backbone, Site, config_of
from deme_cli.diffusion.backbones.known import backbone_of

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


def sites(network: nn.Module, placement: str) -> list[Site]:
    """Where the projections of a placement (`block`, `fold`, `none`) go, in the network's order."""
    if placement == "none":
        return []
    backbone = backbone_of_network(network)
    return list(
        backbone.block_sites(network) if placement == "block" else backbone.fold_sites(network)
    )


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
