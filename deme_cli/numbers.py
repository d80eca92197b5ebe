"""Numbers in words of print: as many digits as their spread allows, and true minus signs."""

from __future__ import annotations

import math
from typing import Any

MINUS = "\N{MINUS SIGN}"
_LARGE = 1e9


def digits_for(spread: float | None, value: float) -> int:
    """Digits after the point: two figures of the spread, without one four of the value."""
    scale = spread if spread else abs(value) / 100
    if not scale or not math.isfinite(scale):
        return 3
    return min(max(1 - math.floor(math.log10(scale)), 0), 6)


def fixed(value: float, digits: int) -> str:
    """With `digits` after the point; a word where it is not finite."""
    return _written(value, f",.{digits}f")


def signed(value: float, digits: int) -> str:
    """The same, with its sign."""
    return _written(value, f"+,.{digits}f")


def _written(value: float, form: str) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:{form if abs(value) < _LARGE else '.4g'}}".replace("-", MINUS)


def plain(value: float | None) -> str:
    """A lone number in four figures; a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", MINUS)
    return f"{value:.4g}".replace("-", MINUS)


def size_of(num_bytes: int) -> str:
    """Bytes as a person reads them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def number(value: Any) -> float:
    """A number of a JSON document; null is nan. Raises TypeError for anything else."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise TypeError(f"expected a number, found {value!r:.40}")
    return float(value)
