"""The features inside a network: what comes out of its blocks, as channels and places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from deme_cli.diffusion.backbones.backbone import Site


@contextmanager
def listening(
    network: nn.Module, places: Sequence[Site], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While open, `take(path, features)` what comes out of each block, its projection included."""

    def hook_of(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            take(site.path, output[site.output] if isinstance(output, tuple) else output)

        return hook

    handles = [
        network.get_submodule(site.path).register_forward_hook(hook_of(site)) for site in places
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_places(features: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Maps (B, C, H, W) or tokens (B, P, C) as (B, C, P) float64, and rows and columns of places.

    shape: of x_t, whose aspect tokens have; those that do not fill such a grid make one row. Stays
    on the device where that has float64.
    """
    device = "cpu" if features.device.type == "mps" else features.device
    features = features.to(device).double()
    if features.ndim == 4:
        return features.flatten(2), (features.shape[2], features.shape[3])
    num = features.shape[1]
    rows = max(round((num * shape[1] / shape[2]) ** 0.5), 1)
    return features.transpose(1, 2), (rows, num // rows) if num % rows == 0 else (1, num)
