"""Count sketches: a gradient of d parameters as m numbers that keep inner products.

(Charikar et al. 2002; Weinberger et al. 2009.) Each parameter i has a place h(i) among the m and a
sign s(i), both random and fixed by its tensor's name; S(g)_k = sum of s(i) g_i over h(i) = k. Over
the hashes, <S(a), S(b)> has the mean <a, b> and a variance of at most

    (|a|^2 |b|^2 + <a, b>^2) / m  <=  2 |a|^2 |b|^2 / m,

up to terms that vanish for gradients spread over many parameters. A cosine from it is therefore off
by sqrt((1 + cos^2) / m) <= sqrt(2 / m), 0.0055 for m = 65,536; divided by the sketches' own norms,
as in `cosines`, by less, since the errors of numerator and denominator go together.
A row is m successive parameters of one tensor. They go to m different places, all shifted by one
random number; the signs are independent. So two parameters meet with probability 1/m or, in one
row, never, and no table of places is kept. With d <= m nothing is hashed and all is exact.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

SIZE = 65_536
_COLUMNS = 4096  # of sketches that are multiplied at a time


class CountSketch:
    """The sketch of tensors with these names and numbers of elements, into at most `size` numbers.

    Other seeds give other hashes. The same names give the same hashes on every machine.
    """

    def __init__(self, sizes: Mapping[str, int], size: int = SIZE, *, seed: int = 0) -> None:
        self.parameters, self.seed = sum(sizes.values()), seed
        self.is_exact = self.parameters <= size
        self.size = self.parameters if self.is_exact else size
        ends = np.cumsum(list(sizes.values()))
        self._starts = {
            name: int(end) - count
            for (name, count), end in zip(sizes.items(), ends, strict=True)
        }  # fmt: skip

    @property
    def standard_error(self) -> float:
        """The largest standard error of a cosine."""
        return 0.0 if self.is_exact else math.sqrt(2 / self.size)

    def __call__(self, tensors: Iterable[tuple[str, Tensor | None]]) -> np.ndarray:
        """The sketch of named tensors (None for zeros): (m,) float64."""
        total = np.zeros(self.size)
        for name, tensor in tensors:
            if tensor is not None:
                values = tensor.detach().float().cpu().flatten().numpy()
                self._add(total, name, values)
        return total

    def _add(self, total: np.ndarray, name: str, values: np.ndarray) -> None:
        if self.is_exact:
            start = self._starts[name]
            total[start : start + len(values)] = values
            return
        random = np.random.Generator(np.random.PCG64(_hash(self.seed, name)))
        for begin in range(0, len(values), self.size):
            row = values[begin : begin + self.size]
            place = int(random.integers(self.size))
            bits = np.frombuffer(random.bytes(-(-len(row) // 8)), dtype=np.uint8)
            signed = np.where(np.unpackbits(bits, count=len(row)).view(bool), row, -row)
            room = self.size - place  # before the row goes on at place 0
            total[place : place + len(row)] += signed[:room]
            if len(row) > room:
                total[: len(row) - room] += signed[room:]


def inner_products(sketches: np.ndarray) -> np.ndarray:
    """<S_i, S_j> for sketches (n, m) in any float: (n, n) float64."""
    total = np.zeros((len(sketches), len(sketches)))
    for begin in range(0, sketches.shape[1], _COLUMNS):
        part = sketches[:, begin : begin + _COLUMNS].astype(np.float64)
        total += part @ part.T
    return total


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines from inner products (n, n); 0 where a vector is 0."""
    norms = np.sqrt(np.diagonal(products))
    scale = np.outer(norms, norms)
    return np.clip(np.divide(products, scale, out=np.zeros_like(products), where=scale > 0), -1, 1)


def _hash(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")
