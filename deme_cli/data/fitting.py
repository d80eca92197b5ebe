"""Bring an image to levels and a shape: sRGB on white; short side scaled (bicubic), one crop.

Files carry more than levels: an alpha channel or key, a colour profile, 16 bits. All of it is
resolved here, so that training, statistics and evaluation see the same pixels.
C channels (1 grey, 3 colour), H height, W width.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps

from deme_cli.errors import ArtifactError

Shape = tuple[int, int, int]  # (C, H, W)
Centering = tuple[float, float]
CENTRE: Centering = (0.5, 0.5)
ON_WHITE = "transparent pixels are put on white (clean-fid drops the alpha channel instead)"
PROFILED = "colour profiles are converted to sRGB (clean-fid leaves them out)"
UNPROFILED = "a colour profile that cannot be used is ignored"
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose 16 bits come in mode I, in some versions of Pillow
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by what a profile speaks of


def is_grey(image: Image.Image) -> bool:
    """Whether an image has no colour, by its mode."""
    return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")


def to_srgb(
    image: Image.Image, name: str, file_format: str | None
) -> tuple[Image.Image, list[str]]:
    """An image of any mode as L or RGB of sRGB, opaque on white; and what is to be told of it.

    Raises ArtifactError for pixels that have no fixed range of brightness.
    """
    profile, told = image.info.get("icc_profile"), []
    levels, alpha = _without_alpha(image, name, file_format)
    if profile:
        try:
            transform, mode = _to_srgb(profile, levels.mode)
            if transform is not None:
                levels = transform.apply(levels.convert(mode))
                told.append(PROFILED)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            told.append(UNPROFILED)
    levels = levels.convert("L" if is_grey(image) else "RGB")
    if alpha is not None and alpha.getextrema()[0] != 255:
        told.append(ON_WHITE)
        white = Image.new(levels.mode, levels.size, "white")
        white.paste(levels, mask=alpha)
        levels = white
    return levels, told


def fit(image: Image.Image, shape: Shape, centering: Centering | None = CENTRE) -> np.ndarray:
    """An image of mode L or RGB as uint8 (C, H, W).

    centering: where the crop lies, (x, y) from (0, 0), left and top, to (1, 1), right and bottom;
    None squeezes the whole image into the shape instead (as BK-SDM does with COCO's).
    """
    channels, height, width = shape
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


def _without_alpha(
    image: Image.Image, name: str, file_format: str | None
) -> tuple[Image.Image, Image.Image | None]:
    """The colours, in L, RGB or CMYK, and alpha in L where the file has any."""
    mode = image.mode
    if mode == "F" or (mode == "I" and file_format not in _SIXTEEN_BITS):
        what = "floats" if mode == "F" else "32-bit numbers"
        raise ArtifactError(
            f"{name}: its pixels are {what}, whose range of brightness no file tells; save it with "
            f"8 or 16 bits"
        )
    if mode == "I" or mode.startswith("I;16"):
        values = np.asarray(image)
        key = image.info.get("transparency")
        alpha = None if key is None else Image.fromarray(np.uint8(255) * (values != key))
        levels = np.rint(values.astype(np.float64) * (255 / 65535)).clip(0, 255)
        return Image.fromarray(levels.astype(np.uint8)), alpha
    if image.has_transparency_data:
        image = image.convert("LA" if is_grey(image) else "RGBA")
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if is_grey(image) else "RGB"), None


@lru_cache(64)
def _to_srgb(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """From a profile to sRGB, and the mode that it takes; None where nothing changes.

    A profile of RGB serves grey levels, too, as three equal channels. Raises what ImageCms raises
    for a profile that is broken, and ValueError for one that speaks of other channels.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    taken = _PROFILE_MODES.get(source.profile.xcolor_space.strip())
    if taken is None or (taken != mode and (mode, taken) != ("L", "RGB")):
        raise ValueError(f"a profile of {source.profile.xcolor_space} for {mode}")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), taken, "RGB")
    if taken != "CMYK":
        ramp = np.arange(0, 256, 15, dtype=np.uint8)
        cube = np.stack(np.meshgrid(ramp, ramp, ramp), axis=-1).reshape(1, -1, 3)
        probe = Image.fromarray(cube).convert(taken)
        found = np.asarray(transform.apply(probe), dtype=int)
        if abs(found - np.asarray(probe.convert("RGB"))).max() <= 1:
            return None, taken
    return transform, taken
