"""The noise of each image, from a seed of its own, so that it depends on no other image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index`: 63 bits, so that it fits an int64."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_noise(seed: int, shape: tuple[int, int, int], indices: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), that of each index from its own seed."""
    generator = torch.Generator()
    seeds = [image_seed(seed, index) for index in indices]
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(s)) for s in seeds])
