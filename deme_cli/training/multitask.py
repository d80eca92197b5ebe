"""Clusters of timesteps as tasks: how their k losses L_1 .. L_k become one update (Go et al. 2023).

    UW       sum_i 1/2 (exp(-s_i) L_i / k + s_i), s is learned   (Kendall et al. 2018, as ANT)
    NashMTL  sum_i alpha_i L_i / k, alpha is solved now and then (Navon et al. 2022)
    PCGrad   sum_i L_i, conflicting gradients projected          (Yu et al. 2020)

Each is a module whose state_dict is all that a run needs to continue. NashMTL and PCGrad measure
the gradient of every loss: k backward passes through one kept graph, and k copies of the gradients
that exist only inside the call. Where these overflow (fp16), the weights stay as they were, so that
what is infinite reaches `.grad` and the loss scaler skips the update.

With gradient accumulation PCGrad projects within each batch, not within their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from deme_cli.training.task_weights import gram, nash_weights, pcgrad_weights

Scale = Callable[[Tensor], Tensor]
Gradients = list[Sequence[Tensor | None]]  # of k losses, each by parameter


class TaskWeights(Protocol):
    """One of the modules below."""

    def backward(
        self,
        losses: Tensor,
        parameters: Sequence[nn.Parameter],
        *,
        step: int,
        generator: torch.Generator,
        scale: Scale,
    ) -> Tensor:
        """Add the gradient of what is minimised to `.grad`; returns its value, a scalar.

        losses: (k,) with their graph, which is freed. Gradients go to `parameters` and to the
        module's own, and are those of `scale(loss)`, a linear function; the value is not scaled.
        `step` counts updates: calls of one step are batches that accumulate.
        """
        ...


class UncertaintyWeights(nn.Module):
    """UW: s is learned beside the network and tends to ln(L_i / k), where the tasks pull alike."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(num_tasks))

    def backward(
        self,
        losses: Tensor,
        parameters: Sequence[nn.Parameter],
        *,
        step: int,
        generator: torch.Generator,
        scale: Scale,
    ) -> Tensor:
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
        self,
        losses: Tensor,
        parameters: Sequence[nn.Parameter],
        *,
        step: int,
        generator: torch.Generator,
        scale: Scale,
    ) -> Tensor:
        if step % self.every == 0 and int(self.measured_at) != step:
            gradients = _measure(losses, parameters, scale)
            self._solve(gradients, step)
            _add(parameters, gradients, self.alpha / len(losses))
            return self._total(losses).detach()
        total = self._total(losses)
        scale(total).backward(inputs=list(parameters))
        return total.detach()

    def _total(self, losses: Tensor) -> Tensor:
        return (self.alpha * losses).sum() / len(losses)

    def _solve(self, gradients: Gradients, step: int) -> None:
        alpha = nash_weights(gram(gradients))
        if alpha is not None:
            self.alpha.copy_(alpha)
        self.measured_at.fill_(step)


class ProjectedGradients(nn.Module):
    """PCGrad: every batch is measured; `generator` draws the orders of the projections."""

    def backward(
        self,
        losses: Tensor,
        parameters: Sequence[nn.Parameter],
        *,
        step: int,
        generator: torch.Generator,
        scale: Scale,
    ) -> Tensor:
        gradients = _measure(losses, parameters, scale)
        products = gram(gradients)
        weights = torch.ones(len(losses), dtype=torch.float64)
        if products.isfinite().all():
            weights = pcgrad_weights(products, generator)
        _add(parameters, gradients, weights)
        return (weights.to(losses) * losses.detach()).sum()


def open_tasks(method: str, num_tasks: int, *, every: int) -> TaskWeights:
    """The module of `method`: uw, nashmtl (solved anew after `every` updates) or pcgrad."""
    if method == "uw":
        return UncertaintyWeights(num_tasks)
    if method == "nashmtl":
        return NashWeights(num_tasks, every)
    assert method == "pcgrad", method
    return ProjectedGradients()


def _measure(losses: Tensor, parameters: Sequence[nn.Parameter], scale: Scale) -> Gradients:
    """The gradient of each scaled loss, one after the other; None where it has no path."""
    last = len(losses) - 1
    return [
        torch.autograd.grad(scale(loss), parameters, retain_graph=i < last, allow_unused=True)
        for i, loss in enumerate(losses.unbind())
    ]


def _add(parameters: Sequence[nn.Parameter], gradients: Gradients, weights: Tensor) -> None:
    """Add sum_i w_i g_i to `.grad`.  weights: (k,)"""
    for weight, gradient in zip(weights.tolist(), gradients, strict=True):
        sums, added = [], []
        for parameter, grad in zip(parameters, gradient, strict=True):
            if grad is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sums.append(parameter.grad)
            added.append(grad)
        if sums:
            torch._foreach_add_(sums, added, alpha=weight)
