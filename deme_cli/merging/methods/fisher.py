"""Fisher-weighted merging: every parameter nearest to the experts that are sure of it.

theta = sum_i w_i F_i theta_i / sum_i w_i F_i, element by element (Matena & Raffel 2022, Eq. 5),
with F_i the diagonal of the empirical Fisher information: the mean over single examples of the
squared gradient of the denoising loss ||target - output||^2 / elements at x_t, t from the range of
expert i. (A classifier's Fisher takes the expectation over its own labels; the loss of a denoiser
is the likelihood of a Gaussian, whose labels would only be noise more.)

As in the published code, each F_i is divided by its L2 norm over all parameters (`normalize`):
gradients differ by orders of magnitude between ranges, and without it the expert of small t weighs
most (its norm is 7 to 37 times the others' on the digits). Where all F_i vanish, as for the bias of
attention's keys, the result is the plain mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from deme_cli.diffusion.conditions import select
from deme_cli.diffusion.denoiser import predict
from deme_cli.errors import NumericsError
from deme_cli.merging.lineage import Family, Parent
from deme_cli.merging.methods.data_driven import (
    DataProgress,
    MergedWeights,
    expert_network,
    expert_weights,
    in_float,
    mean_weights,
    round_like_experts,
    shares,
)
from deme_cli.merging.methods.range_draws import RangeBatch, RangeDraws
from deme_cli.training.held_out import Check

FLOOR = 1e-6  # of the mean F: below it the result is the mean (the published code's target model)

Fisher = dict[str, Tensor]  # float32 on the CPU, by parameter


def merge_fisher(
    family: Family,
    draws: RangeDraws,
    *,
    normalize: bool = True,
    coefficients: Sequence[float] | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    check: Check = lambda: None,
) -> Iterator[DataProgress | MergedWeights]:
    """Merge by Fisher weights; yields progress, then the weights. `coefficients` are the w_i.

    One gradient per draw and expert, so num draws cost as much as num updates of batch 1. Raises
    NumericsError naming an expert that is not finite or whose gradients are not.
    """
    weigh = shares(family, coefficients)
    mean = mean_weights(family, weigh)
    sums = {name: torch.zeros_like(x) for name, x in mean.items() if x.is_floating_point()}
    moments = {name: torch.zeros_like(x) for name, x in sums.items()}
    done, total, norms = 0, len(family.parents) * draws.num, []
    for share, parent in zip(weigh, family.parents, strict=True):
        theta = expert_weights(family, parent)
        network = expert_network(parent, theta, device=device, dtype=dtype)
        fisher = DiagonalFisher(network)
        for batch in draws.batches(parent.record.timesteps, network):
            for example in range(len(batch)):
                fisher.add(batch, example)
            check()
            done += len(batch)
            yield DataProgress(done, total)
        values = fisher.mean()
        norms.append(_norm(parent, values))
        scale = share / (norms[-1] if normalize else 1.0)
        for name, value in values.items():
            sums[name] += scale * value
            moments[name] += scale * value * (in_float(theta[name]) - mean[name])
        del network, fisher, theta, values
    floor = FLOOR * _mean(sums)
    corrections = {name: moments[name] / (sums[name] + floor) for name in sums}
    merged = {**mean, **{name: mean[name] + x for name, x in corrections.items()}}
    yield MergedWeights(round_like_experts(family, merged), {"fisher_norms": norms})


class DiagonalFisher:
    """The mean over examples of the squared gradient of the denoising loss, per parameter.

    One backward pass per example, since gradients of a batch mix its examples. torch.func.vmap is 3
    to 10 times faster on tiny U-Nets and DiTs and 5 times slower on Flux (measured on one core),
    but it lacks attention's fast kernels and takes a copy of the network per example.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network.requires_grad_(True)
        self._parameters = dict(network.named_parameters())
        self._sums = {
            name: torch.zeros_like(parameter, dtype=torch.float32)
            for name, parameter in self._parameters.items()
        }
        self._num = 0

    def add(self, batch: RangeBatch, example: int) -> None:
        """Add the squared gradient of one example of a batch."""
        one = slice(example, example + 1)
        conditions = select(batch.conditions, [example])
        output = predict(self._network, batch.x_t[one], batch.times[one], conditions)
        loss = (output.float() - batch.target[one]).square().mean()
        gradients = torch.autograd.grad(
            loss, list(self._parameters.values()), materialize_grads=True
        )
        for total, gradient in zip(self._sums.values(), gradients, strict=True):
            total.addcmul_(gradient.float(), gradient.float())
        self._num += 1

    def mean(self) -> Fisher:
        return {name: (total / self._num).cpu() for name, total in self._sums.items()}


def _norm(parent: Parent, fisher: Fisher) -> float:
    """The L2 norm over all parameters. Raises NumericsError unless it is finite and above 0."""
    norm = math.sqrt(sum(float(values.double().square().sum()) for values in fisher.values()))
    if not 0 < norm < math.inf:
        raise NumericsError(f"{parent.path}: gradients are zero or not finite; try --dtype fp32")
    return norm


def _mean(fisher: Fisher) -> float:
    """The mean over all elements."""
    total = sum(float(values.double().sum()) for values in fisher.values())
    return total / sum(values.numel() for values in fisher.values())
