"""Bring an image to a shape: short side scaled (bicubic), one crop, channels converted.

C channels (1 grey, 3 colour), H height, W width.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from deme_cli.data.sources import is_grey

Shape = tuple[int, int, int]  # (C, H, W)
Centering = tuple[float, float]
CENTRE: Centering = (0.5, 0.5)


def fit(image: Image.Image, shape: Shape, centering: Centering | None = CENTRE) -> np.ndarray:
    """An image as uint8 (C, H, W). Palettes are resolved, alpha is dropped, 16 bits become 8.

    centering: where the crop lies, (x, y) from (0, 0), left and top, to (1, 1), right and bottom;
    None squeezes the whole image into the shape instead (as BK-SDM does with COCO's).
    """
    channels, height, width = shape
    if is_grey(image) and image.mode not in ("1", "L", "LA"):
        image = _to_eight_bits(image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        size, bicubic = (width, height), Image.Resampling.BICUBIC
        if centering is None:
            image = image.resize(size, bicubic)
        else:
            image = ImageOps.fit(image, size, bicubic, centering=centering)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def crop_corner(
    size: tuple[int, int], shape: Shape, centering: Centering = CENTRE
) -> tuple[int, int]:
    """(top, left) of the crop that `fit` takes, in pixels of the scaled image of original `size`.

    size: (height, width). This is what SDXL is told of a crop (Podell et al. 2023, section 2.2).
    """
    _, height, width = shape
    scale = max(height / size[0], width / size[1])
    x, y = centering
    return round((size[0] * scale - height) * y), round((size[1] * scale - width) * x)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (modes I and I;16) scaled to 8; floats are taken as levels 0 to 255."""
    levels = np.asarray(image).astype(np.float64)
    scale = 1.0 if image.mode == "F" else 255 / 65535
    return Image.fromarray(np.rint(levels * scale).clip(0, 255).astype(np.uint8))
