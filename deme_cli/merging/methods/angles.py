"""Slerp and Model Stock: coefficients from the angles between experts, tensor by tensor.

Slerp (Shoemake 1985) is spherical interpolation of the weights of two experts,
theta = (sin((1 - t) Omega) theta_1 + sin(t Omega) theta_2) / sin(Omega), where Omega is the angle
between theta_1 and theta_2 and t = w_2 = 1 - w_1. As in mergekit, the angle is that of whole
flattened tensors, lengths are left as they are, and tensors that are nearly colinear (|cos| above
COLINEAR), as those of finetuned experts mostly are, or zero are interpolated linearly.

Model Stock (Jang et al. 2024, Eq. 7) says how far to go from the base towards the mean:
theta = t mean_i(theta_i) + (1 - t) theta_0 with t = N cos / (1 + (N - 1) cos), where cos is the
mean cosine between pairs of task vectors; so the linear coefficients of a tensor are t / N each,
and none are given. The paper's geometry supposes cos > 0; where experts point away from each other
on average t = 0, the base (the bare formula, which mergekit takes, goes backwards there, farther
the nearer cos is to -1 / (N - 1)). A task vector of zeros counts as orthogonal to the others, as in
mergekit; equal task vectors give t = 1, the experts' mean.
N experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from deme_cli.merging.inputs import Inputs
from deme_cli.merging.methods.linear import BASE, Method, linear_terms
from deme_cli.merging.tensor_stream import Terms, inner_products

COLINEAR = 0.9995  # mergekit's DOT_THRESHOLD


def slerp(inputs: Inputs) -> Method:
    """Weights of two experts on the arc between them; opening it reads the files once."""
    cosines = {name: _cosine(gram) for name, gram in inner_products(inputs).items()}
    vectors = [expert.is_vector for expert in inputs.experts]

    def terms(name: str, coefficients: Sequence[float]) -> Terms:
        """The terms of theta_1 and theta_2; stored vectors stand for theta + tau."""
        cosine = cosines.get(name)  # integers have none
        if cosine is None or abs(cosine) > COLINEAR:
            return linear_terms(inputs, coefficients)
        weights = arc(coefficients[1], cosine)
        c_0 = sum((w for w, is_vector in zip(weights, vectors, strict=True) if is_vector), 0.0)
        return tuple((k, w) for k, w in enumerate([c_0, *weights]) if w != 0)

    return Method(terms, is_linear=False)


def arc(t: float, cosine: float) -> tuple[float, float]:
    """The weights of both ends at t, for ends at this cosine (Shoemake 1985, section 3.3)."""
    omega = math.acos(cosine)
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


def _cosine(gram: np.ndarray) -> float | None:
    """The cosine between theta + tau_1 and theta + tau_2, from the inner products of theta and the
    tau_i (3, 3); None where one of the two is zero."""
    ends = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    (square_1, product), (_, square_2) = ends @ gram @ ends.T
    size = math.sqrt(max(square_1, 0.0)) * math.sqrt(max(square_2, 0.0))
    return float(np.clip(product / size, -1, 1)) if size else None


def model_stock(inputs: Inputs) -> Method:
    """Coefficients from the angles between experts; opening it reads the files once."""
    count = len(inputs.experts)
    ratios = {name: ratio(gram[1:, 1:]) for name, gram in inner_products(inputs).items()}

    def terms(name: str, coefficients: Sequence[float]) -> Terms:
        if name not in ratios:
            return BASE  # integers
        return linear_terms(inputs, [ratios[name] / count] * count)

    sizes = {spec.name: spec.num_elements for spec in inputs.specs}
    total = sum(sizes[name] for name in ratios)
    mean = sum(t * sizes[name] for name, t in ratios.items()) / max(total, 1)
    return Method(terms, is_linear=False, own_coefficients=(mean / count,) * count)


def ratio(gram: np.ndarray) -> float:
    """t of Eq. 7 from the inner products (N, N) of task vectors, N >= 2; 0 where cos <= 0."""
    count = len(gram)
    norms = np.sqrt(np.diag(gram))
    sizes = np.outer(norms, norms)
    cosines = np.divide(gram, sizes, out=np.zeros_like(gram), where=sizes > 0)
    cosine = float(np.clip(cosines[np.triu_indices(count, 1)].mean(), -1, 1))
    return count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0
