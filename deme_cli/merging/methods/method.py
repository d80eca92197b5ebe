"""What a merging method is: the terms of each tensor, and what becomes of the task vectors before.

Every method ends in one linear combination per tensor, sum_k c_k y_k, where y_0 is the base and y_i
what file i holds or, where the method transforms task vectors, tau'_i; so one engine serves all.
N parents, n elements of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Terms = tuple[tuple[int, float], ...]  # (k: 0 the base, then the parents; c_k), no c_k of 0
Transform = Callable[[str, int, np.ndarray], None]
BASE: Terms = ((0, 1.0),)  # the base itself


@dataclass(frozen=True)
class Method:
    """A method opened for one family of files.

    terms: what the tensor `name` is made of, for its N coefficients.
    transform: turns tau_i (N, n) of the elements `start` ... of the tensor `name` into tau'_i, in
        place; it must not depend on how tensors are cut into pieces. None: terms count the files.
    is_linear: whether the merged weights are linear in the coefficients.
    found: the coefficients, where the method finds them itself (mean over parameters).
    """

    terms: Callable[[str, Sequence[float]], Terms]
    transform: Transform | None = None
    is_linear: bool = True
    found: tuple[float, ...] | None = None


def vector_terms(name: str, coefficients: Sequence[float]) -> Terms:
    """theta + sum_i w_i tau'_i, whatever the tensor."""
    return (*BASE, *((i, float(w)) for i, w in enumerate(coefficients, start=1) if w != 0))
