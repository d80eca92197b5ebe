"""How k conflicting gradients share one update: sum_i c_i g_i, with c found from their Gram matrix.

g_i is the gradient of task i over all parameters, G = (g_i . g_j) is (k, k). Two answers:

    NashMTL  c = a > 0 with G a = 1/a, the bargaining solution   (Navon et al. 2022, Claim 3.1)
    PCGrad   each g_i is projected off those it conflicts with   (Yu et al. 2020, Algorithm 1)

PCGrad's projections are linear combinations of the g_i whose coefficients depend on G alone, so
neither needs the gradients themselves. Everything here is float64 on the CPU and k is small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_STEPS = 100  # of Newton's method; about ten are usual
_CLOSE = 1e-7  # Newton decrement; the error after one more step is about its square
_REACH = 1e4  # two gradients whose cosine is within 1e-8 of -1 have no bargain
_ZERO = 1e-8  # of the longest gradient; float32 rounds at 1e-7


def gram(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """The inner products of k gradients, each a sequence of tensors.  -> (k, k) float64, CPU

    None stands for zeros. One tensor at a time is copied, k times in float64; on Metal, which has
    no float64, products are float32 and only the sum over the tensors is float64.
    """
    products = []
    for rows in zip(*gradients, strict=True):
        known = next((row for row in rows if row is not None), None)
        if known is None:
            continue
        dtype = torch.float32 if known.device.type == "mps" else torch.float64
        zeros = known.new_zeros(()).expand_as(known)
        stacked = torch.stack([(zeros if g is None else g).flatten().to(dtype) for g in rows])
        products.append(stacked @ stacked.T)
    if not products:
        return torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    return torch.stack(products).cpu().double().sum(0)  # one wait for the device


def nash_weights(gram: Tensor) -> Tensor | None:
    """a > 0 with G a = 1/a, for G over its Frobenius norm.  (k, k) float64 -> (k,) float64

    None where there is no such a within reach: a gradient is (almost) nothing or not finite, or
    positive multiples of some add up to (almost) nothing, so that no update would serve them all.
    """
    lengths = gram.diagonal().sqrt()
    if not gram.isfinite().all() or lengths.min() <= _ZERO * lengths.max():
        return None
    bargain = _bargain(gram / torch.outer(lengths, lengths))
    # G = |G| N and a = b / lengths solve for G; for N = G / |G|, a grows by |G|^(1/2)
    return None if bargain is None else bargain / lengths * gram.norm().sqrt()


def _bargain(cosines: Tensor) -> Tensor | None:
    """b > 0 with C b = 1/b, the least point of b'Cb / 2 - sum log b, or None out of reach.

    The function is strictly convex and self-concordant: Newton steps divided by one plus their
    decrement stay positive and converge from anywhere (Nesterov and Nemirovskii 1994).
    """
    b = torch.ones_like(cosines[0])
    for _ in range(_STEPS):
        descent = 1 / b - cosines @ b
        newton = torch.linalg.solve(cosines + torch.diag(b**-2), descent)
        decrement = (newton @ descent).sqrt()
        b = b + newton / (1 + decrement)
        if b.max() > _REACH:
            return None
        if decrement < _CLOSE:
            break
    residual = (b * (cosines @ b) - 1).abs().max()
    return b if residual <= 1e-6 else None


def pcgrad_weights(gram: Tensor, generator: torch.Generator) -> Tensor:
    """c with sum_i g_i^PC = sum_j c_j g_j.  (k, k) float64 -> (k,) float64

    For each i, over j != i in random order: where g_i^PC . g_j < 0, take from g_i^PC its
    projection on the original g_j. Row i of `rows` is g_i^PC in terms of the g_j.
    """
    k = len(gram)
    rows = torch.eye(k, dtype=torch.float64)
    for i in range(k):
        for j in torch.randperm(k, generator=generator).tolist():
            inner = rows[i] @ gram[:, j]
            if j != i and inner < 0:
                rows[i, j] -= inner / gram[j, j]
    return rows.sum(0)
