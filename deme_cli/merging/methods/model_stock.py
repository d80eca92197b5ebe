"""Model Stock (Jang et al. 2024, Eq. 7): how far from the base towards the mean, tensor by tensor.

theta = t mean_i(theta_i) + (1 - t) theta_0 with t = N cos / (1 + (N - 1) cos), where cos is the
mean cosine between pairs of task vectors; so the linear coefficients of a tensor are t / N each,
and none are given. The paper's geometry supposes cos > 0; where experts point away from each other
on average t = 0, the base (the bare formula, which mergekit takes, goes backwards there, farther
the nearer cos is to -1 / (N - 1)). A task vector of zeros counts as orthogonal to the others, as in
mergekit; equal task vectors give t = 1, the experts' mean.
N parents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deme_cli.merging.differences import inner_products
from deme_cli.merging.lineage import Family
from deme_cli.merging.methods.linear import linear_terms
from deme_cli.merging.methods.method import BASE, Method, Terms


def model_stock(family: Family) -> Method:
    """Coefficients from the angles between experts; opening it reads the files once."""
    count = len(family.parents)
    ratios = {name: ratio(gram) for name, gram in inner_products(family).items()}

    def terms(name: str, coefficients: Sequence[float]) -> Terms:
        if name not in ratios:
            return BASE  # integers
        return linear_terms(family, [ratios[name] / count] * count)

    sizes = {spec.name: spec.num_elements for spec in family.specs}
    total = sum(sizes[name] for name in ratios)
    mean = sum(t * sizes[name] for name, t in ratios.items()) / max(total, 1)
    return Method(terms, is_linear=False, found=(mean / count,) * count)


def ratio(gram: np.ndarray) -> float:
    """t of Eq. 7 from the inner products (N, N) of task vectors, N >= 2; 0 where cos <= 0."""
    count = len(gram)
    norms = np.sqrt(np.diag(gram))
    sizes = np.outer(norms, norms)
    cosines = np.divide(gram, sizes, out=np.zeros_like(gram), where=sizes > 0)
    cosine = float(np.clip(cosines[np.triu_indices(count, 1)].mean(), -1, 1))
    return count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0
