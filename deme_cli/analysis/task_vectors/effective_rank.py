"""How many directions a matrix really uses: its effective rank and its stable rank.

With singular values s_1 >= ... >= s_m and p_k = s_k / sum(s), the effective rank is
exp(-sum_k p_k log p_k) (Roy and Vetterli 2007, Eq. 3): m where all s_k are equal, r where r of them
are and the others are 0. The stable rank sum(s^2) / s_1^2 asks how much the largest one leaves.
Singular values come from the Gram matrix of the matrix's smaller side in float64; what is below
s_1 sqrt(m eps), where its rounding hides them, counts as 0. A tensor (out, ...) is the matrix
(out, rest), as its layer multiplies by it. No torch.
m = min(out, rest).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from deme_cli.merging.pieces import PIECE


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, rest) of a tensor; (1, n) of a vector."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def full_rank(shape: tuple[int, ...]) -> int:
    """m: the largest rank that a tensor of this shape can have."""
    return min(matrix_shape(shape))


def gram(
    read: Callable[[int, int], np.ndarray], shape: tuple[int, ...], check: Callable[[], None]
) -> np.ndarray:
    """X^T X or X X^T, whichever is smaller: (m, m) float64.

    read: elements start .. stop - 1 of the flattened tensor, at most PIECE. A matrix with no more
    columns than rows is read in whole rows and never held; the others are held as a whole, for
    each entry of X X^T needs all columns. check: called before each piece.
    """
    rows, columns = matrix_shape(shape)
    if columns > min(rows, PIECE):
        whole = np.empty(rows * columns)
        for start, stop in _spans(rows * columns, PIECE, check):
            whole[start:stop] = read(start, stop)
        wide = whole.reshape(rows, columns)
        return wide @ wide.T if rows <= columns else wide.T @ wide
    total = np.zeros((columns, columns))
    for start, stop in _spans(rows * columns, PIECE // columns * columns, check):
        some = read(start, stop).reshape(-1, columns)
        total += some.T @ some
    return total


def _spans(size: int, step: int, check: Callable[[], None]) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        check()
        yield start, min(start + step, size)


def singular_values(gram: np.ndarray) -> np.ndarray:
    """Of the matrix behind a Gram matrix (m, m): (m,), ascending."""
    squares = np.linalg.eigvalsh(gram)
    noise = max(squares[-1], 0.0) * len(gram) * np.finfo(np.float64).eps
    return np.sqrt(np.where(squares > noise, squares, 0.0))


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the singular values (m,), in [1, m]; nan where all are 0."""
    shares = values[values > 0]
    if not len(shares):
        return math.nan
    shares = shares / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(values: np.ndarray) -> float:
    """Squared Frobenius norm over squared spectral norm, in [1, m]; nan where all are 0."""
    largest = values.max(initial=0.0)
    return float(((values / largest) ** 2).sum()) if largest else math.nan
