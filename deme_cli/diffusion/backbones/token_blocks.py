"""Where a transformer's channel-wise projections go: on the stream of image tokens (B, n, C)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from deme_cli.diffusion.backbones.backbone import Site, config_of


def token_block_sites(
    network: nn.Module, lists: Sequence[str] = ("transformer_blocks",), *, output: int = 0
) -> Iterator[Site]:
    """Every block of the lists; `output` is the place of the image tokens in what a block gives."""
    config = config_of(network)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    for name in lists:
        for index, _ in enumerate(network.get_submodule(name).children()):
            yield Site(f"{name}.{index}", width, output)


def token_fold_sites(
    network: nn.Module, lists: Sequence[str] = ("transformer_blocks",)
) -> Iterator[Site]:
    """The ends of the blocks' residual branches: attention and feed-forward of the image tokens.

    Flux's single blocks have one branch for both streams, whose end is projected for both.
    """
    for block in token_block_sites(network, lists):
        inside = dict(network.get_submodule(block.path).named_modules())
        for name, module in inside.items():
            ends = name in ("ff.net.2", "ffn.net.2", "proj_out") or name.endswith(".to_out.0")
            if ends and isinstance(module, nn.Linear):
                yield Site(f"{block.path}.{name}", module.weight.shape[0])
