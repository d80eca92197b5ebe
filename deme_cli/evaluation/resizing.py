"""Bringing images to the size that a feature network takes, as clean-fid does.

On processors clean-fid's own resizers do it, image by image. On CUDA devices whole batches are
resized where they lie. For Inception: Pillow's bicubic filter on floats (a = -0.5, widened when it
shrinks) is torch's with antialias=True, and within 2e-5 of 255 of it for 32, 256 and 512 pixels to
299. For CLIP: Pillow resizes whole levels, and rounds after either axis; its integer filters in
float64 give the same levels.
B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import torch
from PIL import Image
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
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    steps = Compose([Resize(CLIP_SIZE, InterpolationMode.BICUBIC), CenterCrop(CLIP_SIZE)])
    return lambda image: np.asarray(steps(Image.fromarray(image)))


def clip_batch_resizer(device: torch.device) -> BatchResizer | None:
    """`clip_resizer` for batches on `device`; None where that one is to do it."""
    if device.type != "cuda":  # Metal has no float64
        return None
    return lambda images: resize_as_pillow(images, [CLIP_SIZE])


@torch.inference_mode()
def resize_as_pillow(images: Tensor, size: Sequence[int], interpolation: str = "bicubic") -> Tensor:
    """Resize and centre crop whole levels as Pillow and torchvision do, bit for bit.

    `size` is [short side, and of the square cut out] or [height, width], as torchvision takes it.
    float32 (B, C, H, W) of 0, 1, ..., 255 -> (B, C, H', W'), alike
    """
    from torchvision.transforms.functional import center_crop, resize

    before = images.shape[2:]
    after = resize(images.to("meta"), list(size)).shape[2:]  # torchvision's own arithmetic
    height, width = (
        pillow_kernel(old, new, interpolation).to(images.device)
        for old, new in zip(before, after, strict=True)
    )
    if _takes_height_first(before, after):
        images = _resample(_resample(images.mT, height).mT, width)
    else:
        images = _resample(_resample(images, width).mT, height).mT
    return center_crop(images, list(size))


def pillow_kernel(old: int, new: int, interpolation: str) -> Tensor:
    """By how much each of `old` pixels counts in each of `new` ones: float64 (old, new).

    For 8-bit levels Pillow rounds this to multiples of 2^-22. It rounds 32-bit levels alike, so
    resizing the rows of the unit matrix gives the very numbers.
    """
    unit = Image.fromarray(np.eye(old, dtype=np.int32) << 22)
    kernel = unit.resize((new, old), Image.Resampling[interpolation.upper()])
    return torch.from_numpy(np.array(kernel)).double() / 2**22


def _resample(images: Tensor, kernel: Tensor) -> Tensor:
    """Along the last axis, rounded and clipped to whole levels.

    These sums are exact in float64, in any order; 16 images at a time, as it takes twice the room.
    """
    return torch.cat(
        [
            (part.double() @ kernel + 0.5).floor().clamp(0, 255).to(images.dtype)
            for part in images.split(16)
        ]
    )


def _takes_height_first(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether Pillow resizes the height first: from 13 on where it shrinks far more (Pillow #9549).

    More than twice as many pixels as the width: found by trying, no documentation tells.
    """
    fewer_rows, fewer_columns = (old - new for old, new in zip(before, after, strict=True))
    return int(PIL.__version__.split(".")[0]) >= 13 and fewer_rows > max(0, 2 * fewer_columns)


def in_colour(images: np.ndarray) -> np.ndarray:
    """Grey images as three equal channels.  (B, H, W, C), C of 1 or 3  ->  (B, H, W, 3)"""
    return np.broadcast_to(images, (*images.shape[:3], 3))


def resize_all(images: np.ndarray, resize_image: Resizer) -> np.ndarray:
    """Each image through the resizer, in threads (Pillow and torch let go of the lock)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pillow's Image.fromarray(mode=)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(resize_image, images)))
