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
from deme_cli.merging.methods.method import BASE, Terms


class ModelStock:
    """Coefficients from the angles between experts; opening it reads the files once."""

    transform = None
    is_linear = False

    def __init__(self, family: Family) -> None:
        self._family = family
        count = len(family.parents)
        self._ratios = {name: ratio(gram) for name, gram in inner_products(family).items()}
        sizes = {name: spec.num_elements for header in family.headers
                 for name, spec in header.tensors.items()}  # fmt: skip
        total = sum(sizes[name] for name in self._ratios)
        mean = sum(t * sizes[name] for name, t in self._ratios.items()) / max(total, 1)
        self.found = (mean / count,) * count

    def terms(self, name: str, coefficients: Sequence[float]) -> Terms:
        count = len(self._family.parents)
        if name not in self._ratios:
            return BASE  # integers
        return linear_terms(self._family, [self._ratios[name] / count] * count)


def ratio(gram: np.ndarray) -> float:
    """t of Eq. 7 from the inner products (N, N) of task vectors, N >= 2; 0 where cos <= 0."""
    count = len(gram)
    norms = np.sqrt(np.diag(gram))
    sizes = np.outer(norms, norms)
    cosines = np.divide(gram, sizes, out=np.zeros_like(gram), where=sizes > 0)
    cosine = float(np.clip(cosines[np.triu_indices(count, 1)].mean(), -1, 1))
    return count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0
