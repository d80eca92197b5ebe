"""Pictures inside the page: PNG files that are PNG files, as data URIs, large ones reduced."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli.errors import ArtifactError

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 4_000_000  # of one picture in the page
_MAX_FILE, _MAX_PIXELS = 1 << 28, 100_000_000
_SIDE = 2400  # pixels that the longer side is reduced to at first


@dataclass(frozen=True)
class Picture:
    """What an <img> needs. `remark` tells where the picture is not the file's own."""

    name: str
    uri: str
    width: int
    height: int
    remark: str = ""


def read_picture(path: Path) -> Picture:
    """The picture in a PNG file, decoded once to be sure of it.

    Raises ArtifactError where it is none, is cut short or has more pixels than a page can show.
    """
    from PIL import Image

    try:
        if (size := path.stat().st_size) > _MAX_FILE:
            raise ArtifactError(f"{path}: {size:,} bytes, too many for a page")
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS:
                raise ArtifactError(f"{path}: {width} x {height} pixels, too many for a page")
            image.load()
            if len(data) <= MAX_BYTES:
                return Picture(path.name, _uri(data), width, height)
            reduced, data = _reduced(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"{path}: not a whole PNG file") from error
    remark = f"reduced from {width} x {height} pixels"
    return Picture(path.name, _uri(data), *reduced, remark)


def _reduced(image: Image.Image) -> tuple[tuple[int, int], bytes]:
    """A copy small enough for the page: its size and its bytes."""
    side = _SIDE
    while True:
        copy = image.copy()
        copy.thumbnail((side, side))
        stream = io.BytesIO()
        copy.save(stream, format="PNG", optimize=True)
        if stream.tell() <= MAX_BYTES:
            return copy.size, stream.getvalue()
        side = side * 3 // 4


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
