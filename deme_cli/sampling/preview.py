"""The preview: the first images side by side, small ones enlarged, large ones reduced."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from deme_cli.files import write_whole

MAX_IMAGES = 64
_GAP, _PAPER = 2, 255  # pixels between images, and their level
_LEAST_WIDTH, _MOST_WIDTH = 256, 2048


def preview_path(output: Path) -> Path:
    """`ensemble.png` for `ensemble.safetensors`, `images.png` beside the folder `images`."""
    stem = output.stem if output.suffix == ".safetensors" else output.resolve().name
    return output.parent / f"{stem}.png"


def grid(images: np.ndarray) -> np.ndarray:
    """Images side by side, each pixel enlarged to a square.  uint8 (n, H, W, C) -> (H', W', C)

    Where they would fill more than _MOST_WIDTH, squares of pixels become one instead.
    """
    columns = math.ceil(math.sqrt(len(images)))
    side = math.ceil(columns * images.shape[2] / _MOST_WIDTH)
    if side > 1:
        images = np.stack([_reduced(image, side) for image in images])
    num, height, width, channels = images.shape
    rows = math.ceil(num / columns)
    scale = max(1, math.ceil((_LEAST_WIDTH - _GAP * (columns + 1)) / (columns * width)))
    high, wide = height * scale + _GAP, width * scale + _GAP
    sheet = np.full((rows * high + _GAP, columns * wide + _GAP, channels), _PAPER, np.uint8)
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    for index, image in enumerate(large):
        top, left = _GAP + index // columns * high, _GAP + index % columns * wide
        sheet[top : top + height * scale, left : left + width * scale] = image
    return sheet


def _reduced(image: np.ndarray, side: int) -> np.ndarray:
    """The mean of each square of side x side pixels.  uint8 (H, W, C) -> (H / side, W / side, C)"""
    height, width, channels = image.shape
    rows, columns = max(1, height // side), max(1, width // side)
    squares = image[: rows * side, : columns * side].reshape(rows, -1, columns, side, channels)
    return squares.mean(axis=(1, 3)).round().astype(np.uint8)


def write_preview(path: Path, images: np.ndarray) -> None:
    """Write the first images as one PNG file."""
    write_whole(path, [png_bytes(grid(images[:MAX_IMAGES]))])


def png_bytes(image: np.ndarray) -> bytes:
    """One image (H, W, C) uint8 as a PNG file, C of 1 or 3; of others the first channels show."""
    channels = image.shape[2]
    shown = image[:, :, :3] if channels >= 3 else image[:, :, 0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(shown)).save(buffer, format="PNG")
    return buffer.getvalue()
