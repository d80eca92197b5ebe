"""theta + sum_i w_i tau_i (Eq. 8; task arithmetic of Ilharco et al. 2023, section 2), unchanged.

With tau_i = theta_i - theta, experts need no subtraction: the sum is c_0 theta + sum_i w_i x_i,
where x_i is an expert's theta_i or a stored tau_i, and c_0 = 1 - sum of w_i over the experts. So
coefficients 0 copy the base bit for bit, and one expert with coefficient 1 is copied itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deme_cli.merging.lineage import Family
from deme_cli.merging.methods.method import Method, Terms


def linear(family: Family) -> Method:
    """Task vectors as they are."""
    return Method(lambda name, coefficients: linear_terms(family, coefficients))


def linear_terms(family: Family, coefficients: Sequence[float]) -> Terms:
    """Files and coefficients whose sum is Eq. 8, those with coefficient 0 left out.

    c_0 is taken as 0 where it is only the rounding of the coefficients (three times 1/3).
    """
    weights = [w for w, parent in zip(coefficients, family.parents, strict=True)
               if not parent.is_vector]  # fmt: skip
    c_0 = 1.0 - sum(weights)
    if abs(c_0) <= len(weights) * np.finfo(np.float64).eps:
        c_0 = 0.0
    return tuple((k, w) for k, w in enumerate([c_0, *map(float, coefficients)]) if w != 0)
