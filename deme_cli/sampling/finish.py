"""From x_0 to the finished image: decoded, as 8-bit levels, resized.

B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deme_cli.config import SampleConfig
from deme_cli.errors import NumericsError
from deme_cli.sampling.scene import Scene

DECODED_PIXELS = 1 << 20  # images decoded together: a VAE takes some GiB for this many pixels


@torch.inference_mode()
def finish_images(x0: Tensor, scene: Scene, config: SampleConfig, *, first: int) -> np.ndarray:
    """Images first .. first + B - 1 of x_0 (B, C, h, w), uint8 (B, H, W, C).

    Raises NumericsError if one is not finite.
    """
    at_once = max(1, DECODED_PIXELS // math.prod(scene.drawn_shape[1:]))
    images = []
    for part in x0.split(at_once):
        decoded = scene.companions.decode(part)
        if not torch.isfinite(decoded).all():
            raise NumericsError(
                f"images {first} to {first + len(x0) - 1} are not finite after {config.steps} "
                f"steps of {config.sampler}; the weights are broken, or --dtype is too narrow for "
                f"them"
            )
        images.append(to_levels(decoded))
    return resize_images(np.concatenate(images), scene.resize)


def to_levels(images: Tensor) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] as uint8 (B, H, W, C), rounded as diffusers' pipelines do."""
    levels = (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def resize_images(images: np.ndarray, size: int | None) -> np.ndarray:
    """uint8 (B, H, W, C) -> (B, size, size, C) by Pillow's bicubic filter, as BK-SDM does.

    (Kim et al. 2023, generate.py.) Pillow resizes channels independently, so any number will do.
    """
    if size is None:
        return images
    resized = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for index, image in enumerate(images):
        for channel in range(image.shape[2]):
            plane = Image.fromarray(np.ascontiguousarray(image[:, :, channel]))
            small = plane.resize((size, size), Image.Resampling.BICUBIC)
            resized[index, :, :, channel] = np.asarray(small)
    return resized
