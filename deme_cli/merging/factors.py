"""One LoRA from adapters, sum_i w_i B_i A_i = [w_1 B_1 ... w_N B_N] [A_1; ...; A_N], by layer.

Exact at the sum R of the ranks. Below it the largest singular values are kept, which a QR of either
side and the SVD of what stands between them give (at most R x R): the sum itself is never formed.
Averages of A and of B are another sum. No torch.

A, down: (r, in, *kernel)   B, up: (out, r, ...), 1 x 1 for a convolution
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deme_cli.errors import NumericsError
from deme_cli.merging.inputs import Inputs, changed_by
from deme_cli.merging.tensor_stream import Products, Terms

ROUNDING = 1e-14  # of a sum of squares: below what float32 holds of its largest terms
Pair = tuple[np.ndarray, np.ndarray]


@np.errstate(over="ignore", invalid="ignore")  # looked for in the result
def merged_factors(
    inputs: Inputs, terms: Mapping[str, Terms], rank: int
) -> tuple[dict[str, np.ndarray], float]:
    """A and B of every layer by their names, float64, and the share of the squared sum they keep.

    inputs: all hold adapters.   terms: as a linear method has them.   rank: of each layer at most.
    Raises NumericsError naming a factor that is not finite.
    """
    held: dict[str, list[tuple[int, Pair]]] = {}
    named: dict[str, tuple[str, str]] = {}
    for source, expert in enumerate(inputs.experts, start=1):
        products = Products(expert.header)
        for name, sides in changed_by(expert.header).items():
            pair = products.factors(name)
            for side, numbers in zip(sides, pair, strict=True):
                if not np.isfinite(numbers).all():
                    raise NumericsError(f"{expert.path}: {side!r} is not finite")
            held.setdefault(name, []).append((source, pair))
            named[name] = sides
    found, whole, kept = dict[str, np.ndarray](), 0.0, 0.0
    for name, pairs in held.items():
        by_source = dict(terms[name])
        pairs = [one for one in pairs if one[0] in by_source] or pairs[:1]  # w_i = 0: no rank
        down = np.concatenate([pair[0] for _, pair in pairs]).astype(np.float64)
        up = np.concatenate([by_source.get(k, 0.0) * pair[1].astype(np.float64)
                             for k, pair in pairs], axis=1)  # fmt: skip
        whole += square(down, up)
        if not np.isfinite(whole):  # of which LAPACK never finds the singular values
            raise NumericsError(f"{name!r} would not be finite; take smaller coefficients")
        if rank < len(down):
            down, up = truncated(down, up, rank=rank)
        kept += square(down, up)
        kernel = inputs.base.tensors[name].shape[1:]
        found[named[name][0]] = down.reshape(-1, *kernel)
        found[named[name][1]] = up.reshape(*up.shape, *[1] * (len(kernel) - 1))
    return found, kept / whole if whole else 1.0


def square(down: np.ndarray, up: np.ndarray) -> float:
    """|B A|^2, of matrices, as the sum over (B^T B) * (A A^T)."""
    return float(((up.T @ up) * (down @ down.T)).sum())


def truncated(
    down: np.ndarray, up: np.ndarray, *, rank: int | None = None, explained: float | None = None
) -> Pair:
    """The best factors (A, B) of a rank, or of the least rank that keeps a share of |B A|^2.

    down: (r, in)   up: (out, r), both float64. Columns and rows come with the same length, so that
    half precision holds either.
    """
    (left, first), (right, last) = np.linalg.qr(up), np.linalg.qr(down.T)
    u, s, v = np.linalg.svd(first @ last.T, full_matrices=False)
    shares = (s**2).cumsum() / ((s**2).sum() or 1)
    least = int((shares < (explained or 1) - ROUNDING).sum()) + 1
    count = min(least, rank or least, len(s))
    root = np.sqrt(s[:count])
    return root[:, None] * (v[:count] @ right.T), left @ u[:, :count] * root
