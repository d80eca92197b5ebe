"""What a merging method is, and the first: theta + sum_i w_i tau_i (Eq. 8; task arithmetic of
Ilharco et al. 2023, section 2).

Every method ends in one linear combination per tensor, sum_k c_k y_k, where y_0 is the base and y_i
what file i holds or, where the method transforms task vectors, tau'_i; so one engine serves all.

With tau_i = theta_i - theta, experts need no subtraction: the sum is c_0 theta + sum_i w_i x_i,
where x_i is an expert's theta_i or a stored tau_i, and c_0 = 1 - sum of w_i over the experts. So
coefficients 0 copy the base bit for bit, and one expert with coefficient 1 is copied itself.
N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deme_cli.merging.inputs import Inputs
from deme_cli.merging.tensor_stream import Terms, Transform

BASE: Terms = ((0, 1.0),)  # the base itself


@dataclass(frozen=True)
class Method:
    """A method opened for the inputs of a merge.

    terms: what the tensor `name` is made of, for its N coefficients.
    transform: turns tau_i (N, n) of the elements `start` ... of the tensor `name` into tau'_i, in
        place; it must not depend on how tensors are cut into pieces. None: terms count the files.
    is_linear: whether the merged weights are linear in the coefficients.
    own_coefficients: those that the method finds itself, if it does (mean over parameters).
    """

    terms: Callable[[str, Sequence[float]], Terms]
    transform: Transform | None = None
    is_linear: bool = True
    own_coefficients: tuple[float, ...] | None = None


def vector_terms(name: str, coefficients: Sequence[float]) -> Terms:
    """theta + sum_i w_i tau'_i, whatever the tensor."""
    return (*BASE, *((i, float(w)) for i, w in enumerate(coefficients, start=1) if w != 0))


def linear(inputs: Inputs) -> Method:
    """Task vectors as they are."""
    return Method(lambda name, coefficients: linear_terms(inputs, coefficients))


def linear_terms(inputs: Inputs, coefficients: Sequence[float]) -> Terms:
    """Files and coefficients whose sum is Eq. 8, those with coefficient 0 left out.

    c_0 is taken as 0 where it is only the rounding of the coefficients (three times 1/3).
    """
    weights = [w for w, expert in zip(coefficients, inputs.experts, strict=True)
               if not expert.is_vector]  # fmt: skip
    c_0 = 1.0 - sum(weights)
    if abs(c_0) <= len(weights) * np.finfo(np.float64).eps:
        c_0 = 0.0
    return tuple((k, w) for k, w in enumerate([c_0, *map(float, coefficients)]) if w != 0)
