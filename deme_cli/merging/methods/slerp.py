"""Slerp: spherical interpolation of the weights of two experts, tensor by tensor (Shoemake 1985).

theta = (sin((1 - t) Omega) theta_1 + sin(t Omega) theta_2) / sin(Omega), where Omega is the angle
between theta_1 and theta_2 and t = w_2 = 1 - w_1. As in mergekit, the angle is that of whole
flattened tensors, lengths are left as they are, and tensors that are nearly colinear (|cos| above
COLINEAR), as those of finetuned experts mostly are, or zero are interpolated linearly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from deme_cli.merging.differences import inner_products
from deme_cli.merging.lineage import Family
from deme_cli.merging.methods.linear import linear_terms
from deme_cli.merging.methods.method import Method, Terms

COLINEAR = 0.9995  # mergekit's DOT_THRESHOLD


def slerp(family: Family) -> Method:
    """Weights of two experts on the arc between them; opening it reads the files once."""
    grams = inner_products(family, of_weights=True)
    cosines = {name: _cosine(gram) for name, gram in grams.items()}
    vectors = [parent.is_vector for parent in family.parents]

    def terms(name: str, coefficients: Sequence[float]) -> Terms:
        """The terms of theta_1 and theta_2; stored vectors stand for theta + tau."""
        cosine = cosines.get(name)  # integers have none
        if cosine is None or abs(cosine) > COLINEAR:
            return linear_terms(family, coefficients)
        weights = arc(coefficients[1], cosine)
        c_0 = sum((w for w, is_vector in zip(weights, vectors, strict=True) if is_vector), 0.0)
        return tuple((k, w) for k, w in enumerate([c_0, *weights]) if w != 0)

    return Method(terms, is_linear=False)


def arc(t: float, cosine: float) -> tuple[float, float]:
    """The weights of both ends at t, for ends at this cosine (Shoemake 1985, section 3.3)."""
    omega = math.acos(cosine)
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


def _cosine(gram: np.ndarray) -> float | None:
    """The cosine between two vectors with these inner products; None where one is zero."""
    size = math.sqrt(gram[0, 0]) * math.sqrt(gram[1, 1])
    return float(np.clip(gram[0, 1] / size, -1, 1)) if size else None
