"""Clusters of timesteps as tasks: how their k losses L_1 .. L_k become one update (Go et al. 2023).

    UW       sum_i 1/2 (exp(-s_i) L_i / k + s_i), s is learned   (Kendall et al. 2018, as ANT)
    NashMTL  sum_i a_i L_i / k, a > 0 with G a = 1/a             (Navon et al. 2022, Claim 3.1)
    PCGrad   sum_i L_i, each g_i projected off those it conflicts with (Yu et al. 2020, Alg. 1)

g_i is the gradient of task i over all parameters, G = (g_i . g_j) is (k, k). PCGrad's projections
are linear combinations of the g_i whose coefficients depend on G alone, so neither needs the
gradients themselves; what is found from G is float64 on the CPU, for k is small.

Each is a module whose state_dict is all that a run needs to continue. Its `backward` adds the
gradient of what is minimised to `.grad` of `parameters` and of its own, and returns its value.
losses: (k,) with their graph, which is freed.   scale: a linear function of a loss before it is
differentiated; the value is not scaled.   step counts updates: calls of one step are batches that
accumulate.

NashMTL and PCGrad measure the gradient of every loss: k backward passes through one kept graph, and
k copies of the gradients that exist only inside the call. Where these overflow (fp16), the weights
stay as they were, so that what is infinite reaches `.grad` and the loss scaler skips the update.
With gradient accumulation PCGrad projects within each batch, not within their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Scale = Callable[[Tensor], Tensor]
TaskGradients = list[Sequence[Tensor | None]]  # of k losses, each by parameter

_STEPS = 100  # of Newton's method; about ten are usual
_CLOSE = 1e-7  # Newton decrement; the error after one more step is about its square
_REACH = 1e4  # two gradients whose cosine is within 1e-8 of -1 have no bargain
_ZERO = 1e-8  # of the longest gradient; float32 rounds at 1e-7


class UncertaintyWeights(nn.Module):
    """UW: s is learned beside the network and tends to ln(L_i / k), where the tasks pull alike."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(num_tasks))

    def backward(
        self, losses: Tensor, parameters: Sequence[nn.Parameter], *, step: int,
        generator: torch.Generator, scale: Scale,
    ) -> Tensor:  # fmt: skip
        s = self.log_variances
        total = 0.5 * (torch.exp(-s) * losses / len(losses) + s).sum()
        scale(total).backward(inputs=[*parameters, s])
        return total.detach()


class NashWeights(nn.Module):
    """NashMTL: alpha, 1 at first, is solved anew at the updates that `every` divides.

    Only the first batch of such an update is measured; alpha stays where there is no solution.
    """

    alpha: Tensor
    measured_at: Tensor

    def __init__(self, num_tasks: int, every: int) -> None:
        super().__init__()
        self.every = every
        self.register_buffer("alpha", torch.ones(num_tasks))
        self.register_buffer("measured_at", torch.tensor(-1))  # the update; -1 is none

    def backward(
        self, losses: Tensor, parameters: Sequence[nn.Parameter], *, step: int,
        generator: torch.Generator, scale: Scale,
    ) -> Tensor:  # fmt: skip
        if is_measured := step % self.every == 0 and int(self.measured_at) != step:
            gradients = _measure(losses, parameters, scale)
            if (alpha := nash_weights(gram(gradients))) is not None:
                self.alpha.copy_(alpha)
            self.measured_at.fill_(step)
            _add(parameters, gradients, self.alpha / len(losses))
        total = (self.alpha * losses).sum() / len(losses)
        if not is_measured:
            scale(total).backward(inputs=list(parameters))
        return total.detach()


class ProjectedGradients(nn.Module):
    """PCGrad: every batch is measured; `generator` draws the orders of the projections."""

    def backward(
        self, losses: Tensor, parameters: Sequence[nn.Parameter], *, step: int,
        generator: torch.Generator, scale: Scale,
    ) -> Tensor:  # fmt: skip
        gradients = _measure(losses, parameters, scale)
        products = gram(gradients)
        weights = torch.ones(len(losses), dtype=torch.float64)
        if products.isfinite().all():
            weights = pcgrad_weights(products, generator)
        _add(parameters, gradients, weights)
        return (weights.to(losses) * losses.detach()).sum()


Tasks = UncertaintyWeights | NashWeights | ProjectedGradients


def open_tasks(method: str, num_tasks: int, *, every: int) -> Tasks:
    """The module of `method`: uw, nashmtl (solved anew after `every` updates) or pcgrad."""
    if method == "nashmtl":
        return NashWeights(num_tasks, every)
    return UncertaintyWeights(num_tasks) if method == "uw" else ProjectedGradients()


def _measure(losses: Tensor, parameters: Sequence[nn.Parameter], scale: Scale) -> TaskGradients:
    """The gradient of each scaled loss, one after the other; None where it has no path."""
    last = len(losses) - 1
    return [
        torch.autograd.grad(scale(loss), parameters, retain_graph=i < last, allow_unused=True)
        for i, loss in enumerate(losses.unbind())
    ]


def _add(parameters: Sequence[nn.Parameter], gradients: TaskGradients, weights: Tensor) -> None:
    """Add sum_i w_i g_i to `.grad`.  weights: (k,)"""
    for weight, gradient in zip(weights.tolist(), gradients, strict=True):
        for parameter, grad in zip(parameters, gradient, strict=True):
            if grad is not None:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(grad, alpha=weight)


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
