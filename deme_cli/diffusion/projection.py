"""Channel-wise projection: P(F_t) = W F_t, W in R^{C x C} the identity at the start (section 3.2).

Two placements. `block` is the paper's: one matrix after every down, mid and up block, on the main
path (the skips are taken before it). It cannot be folded into the network everywhere, because
every consumer begins with a GroupNorm. `fold` puts matrices only on linear outputs (the convolution
of a down- or upsampler; where a block has none, the last convolution of each residual branch
and the output of each attention), so that W K and W b are an ordinary layer and the trained network
is a plain diffusers network. It is another function than the paper's placement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

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


def block_sites(network: nn.Module) -> Iterator[tuple[str, int]]:
    """Module path and width of every down, mid and up block."""
    widths = list(network.config.block_out_channels)
    for index, width in enumerate(widths):
        yield f"down_blocks.{index}", width
    if network.mid_block is not None:
        yield "mid_block", widths[-1]
    for index, width in enumerate(reversed(widths)):
        yield f"up_blocks.{index}", width


def fold_sites(network: nn.Module) -> Iterator[tuple[str, int]]:
    """Module path and output width of the linear layers that carry a projection in `fold`."""
    for block, _ in block_sites(network):
        module = network.get_submodule(block)
        inside = dict(module.named_modules())
        resamplers = [
            name for name in inside
            if name in ("downsamplers.0.conv", "upsamplers.0.conv")
            and isinstance(inside[name], nn.Conv2d)
        ]  # fmt: skip
        branches = [name for name in inside if name.endswith((".conv2", ".to_out.0"))]
        for name in resamplers or branches:
            weight = inside[name].weight
            yield f"{block}.{name}", weight.shape[0]


def attach_projections(network: nn.Module, placement: str) -> None:
    """Add identity projections to `network`, which then owns them as `channel_projection.*`.

    placement: `block`, `fold`, or `none` (which adds nothing).
    """
    if placement == "none":
        return
    sites = list(block_sites(network) if placement == "block" else fold_sites(network))
    projections = nn.ModuleDict(
        {site.replace(".", "_"): ChannelProjection(width) for site, width in sites}
    )
    network.add_module(PREFIX, projections)
    for site, _ in sites:
        projection = projections[site.replace(".", "_")]
        network.get_submodule(site).register_forward_hook(_ProjectOutput(projection))


class _ProjectOutput:
    """A forward hook that projects a module's output; of a tuple (h, skips), only h."""

    def __init__(self, projection: ChannelProjection) -> None:
        self.projection = projection

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if isinstance(output, tuple):
            return (self.projection(output[0]), *output[1:])
        return self.projection(output)


def fold_weights(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """`fold`-placed projections multiplied into the layers they follow: W K and W b.

    weights: the parameters of `network` with its `channel_projection.*`; the result has the names
    of the plain network and gives the same outputs up to rounding (the product is in float64).
    """
    folded = {name: tensor for name, tensor in weights.items() if not has_projections([name])}
    for site, _ in fold_sites(network):
        matrix = weights[f"{PREFIX}.{site.replace('.', '_')}.weight"].double()
        for part in ("weight", "bias"):
            name = f"{site}.{part}"
            if name in folded:
                layer = folded[name]
                folded[name] = torch.tensordot(matrix, layer.double(), dims=1).to(layer.dtype)
    return folded
