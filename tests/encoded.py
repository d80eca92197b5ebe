"""Images and tables as files hold them."""

from __future__ import annotations

import io

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def parquet(**columns: list) -> bytes:
    """A parquet file of these columns, as any writer of tables would make it."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()
