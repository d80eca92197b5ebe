"""Bringing images to the size that a feature network takes, as clean-fid does.

On processors clean-fid's own resizers do it, image by image. On CUDA devices whole batches are
resized where they lie: Pillow's bicubic filter on floats (a = -0.5, widened when it shrinks) is
torch's with antialias=True, and within 2e-5 of 255 of it for 32, 256 and 512 pixels to 299.
B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deme_cli.evaluation.networks import quiet_clean_fid

CLIP_SIZE = 224
INCEPTION_SIZE = 299
Resizer = Callable[[np.ndarray], np.ndarray]  # one image (H, W, 3) -> (H', W', 3)
BatchResizer = Callable[[Tensor], Tensor]  # float32 (B, C, H, W) -> (B, C, H', W')


def inception_resizer(resize: str) -> Resizer | None:
    """clean-fid's own resizer of a mode; None for legacy_tensorflow, whose network resizes."""
    if resize == "legacy_tensorflow":
        return None
    with quiet_clean_fid():
        from cleanfid.resize import build_resizer

        return build_resizer(resize)


def inception_batch_resizer(resize: str, device: torch.device) -> BatchResizer | None:
    """The resizer of a mode for batches on `device`; None where `inception_resizer` is to do it.

    Not every backend has these filters: processors keep the exact ones, Metal lacks antialiasing.
    """
    if device.type != "cuda":
        return None
    return {"clean": resize_clean, "legacy_pytorch": resize_legacy_pytorch}.get(resize)


@torch.inference_mode()
def resize_clean(images: Tensor) -> Tensor:
    """clean-fid's mode `clean`: Pillow's bicubic on floats, clipped but not rounded.

    (B, C, H, W) in [0, 255] -> (B, C, 299, 299) in [0, 255]  (Parmar et al. 2022)
    """
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    return functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 255)


@torch.inference_mode()
def resize_legacy_pytorch(images: Tensor) -> Tensor:
    """clean-fid's mode `legacy_pytorch`: bilinear without antialiasing, as pytorch-fid."""
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    return functional.interpolate(images, size, mode="bilinear").clamp(0, 255)


def clip_resizer() -> Resizer:
    """Short side to 224 (bicubic) and centre crop, as in clean-fid's `clip_features`."""
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    steps = Compose([Resize(CLIP_SIZE, InterpolationMode.BICUBIC), CenterCrop(CLIP_SIZE)])
    return lambda image: np.asarray(steps(Image.fromarray(image)))


def in_colour(images: np.ndarray) -> np.ndarray:
    """Grey images as three equal channels.  (B, H, W, C), C of 1 or 3  ->  (B, H, W, 3)"""
    return np.broadcast_to(images, (*images.shape[:3], 3))


def resize_all(images: np.ndarray, resize_image: Resizer) -> np.ndarray:
    """Each image through the resizer, in threads (Pillow and torch let go of the lock)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pillow's Image.fromarray(mode=)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(resize_image, images)))
