"""The k-th largest magnitude of a vector too long for memory, exactly, in two passes over pieces.

The bits of a float32 without sign sort like the number. The first pass counts them by their upper
16 bits, which tells the bin of the k-th largest; the second counts the lower 15 bits within that
bin (a radix selection). float64 numbers count by their float32 rounding.
N vectors, n elements of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

LOW_BITS = 15  # of the 31 without sign
NUM_HIGH, NUM_LOW = 1 << (31 - LOW_BITS), 1 << LOW_BITS
NOT_FINITE = 0x7F800000 >> LOW_BITS  # first bin of infinities and NaN


def magnitudes(vectors: np.ndarray) -> np.ndarray:
    """|v| in float32, which thresholds are compared with."""
    return np.abs(vectors).astype(np.float32, copy=False)


def kth_largest(
    walk: Callable[[], Iterable[np.ndarray]], count: int, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """The k-th largest magnitude of `count` vectors (N,), and which of them are finite (N,).

    walk: gives the pieces (N, n) of the vectors, twice.   k = int(share * size), at least 1, as in
    the authors' code and in mergekit.
    """
    high = np.zeros((count, NUM_HIGH), np.int64)
    for piece in walk():
        for vector, histogram in zip(piece, high, strict=True):
            bits = magnitudes(vector).view(np.uint32)
            histogram += np.bincount(bits >> LOW_BITS, minlength=NUM_HIGH)
    k = max(1, int(share * high[0].sum()))
    places = [_bin_of(histogram, k) for histogram in high]
    low = np.zeros((count, NUM_LOW), np.int64)
    for piece in walk():
        for vector, histogram, (place, _) in zip(piece, low, places, strict=True):
            bits = magnitudes(vector).view(np.uint32)
            within = bits[bits >> LOW_BITS == place] & (NUM_LOW - 1)
            histogram += np.bincount(within, minlength=NUM_LOW)
    found = [
        place << LOW_BITS | _bin_of(histogram, rank)[0]
        for histogram, (place, rank) in zip(low, places, strict=True)
    ]
    are_finite = high[:, NOT_FINITE:].sum(axis=1) == 0
    return np.array(found, np.uint32).view(np.float32), are_finite


def _bin_of(histogram: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and its rank among those within."""
    from_top = np.cumsum(histogram[::-1])
    index = int(np.searchsorted(from_top, k))
    place = len(histogram) - 1 - index
    return place, int(k - (from_top[index] - histogram[place]))
