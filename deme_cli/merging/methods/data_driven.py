"""What merges that look at data share: experts one at a time, their mean, progress, and the file.

A parent is an expert or a task vector; of a task vector, theta_i is theta + tau_i. Weights are
computed in float32 (float64 tensors in float64) and rounded once to the dtypes of the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.diffusion.denoiser import assemble
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.merging.lineage import Family, Parent
from deme_cli.merging.merged_record import merged_record
from deme_cli.records import MergedRecord


@dataclass(frozen=True)
class DataProgress:
    """Images forwarded so far, of all that will be."""

    done: int
    total: int


@dataclass(frozen=True)
class MergedWeights:
    """The merged network: names and dtypes of the base, with the projections of the experts.

    `details` are numbers worth a line in a report.
    """

    weights: dict[str, Tensor]
    details: dict[str, Any]


def shares(family: Family, coefficients: Sequence[float] | None) -> list[float]:
    """The coefficients divided by their sum, 1/N each where there are none.

    Raises ConfigError unless there is one per parent, none negative, and one above 0.
    """
    values = [1.0] * len(family.parents) if coefficients is None else list(coefficients)
    if len(values) != len(family.parents):
        raise ConfigError(
            f"{len(values)} coefficients for {len(family.parents)} experts; give one for each"
        )
    if not all(0 <= w < float("inf") for w in values) or sum(values) == 0:
        raise ConfigError(
            f"coefficients {values}: a merge from data takes finite ones from 0 up, not all 0"
        )
    total = math.fsum(values)  # exact, so that 1/N each is 1 each
    return [w / total for w in values]


def expert_weights(family: Family, parent: Parent) -> dict[str, Tensor]:
    """theta_i on the CPU, in the dtypes of its file."""
    weights = load_tensors(parent.path)
    if not parent.is_vector:
        return weights
    theta = load_tensors(family.base.path)
    for spec in family.projections:
        theta[spec.name] = torch.eye(spec.shape[0])
    return {name: _add(theta[name], tau) for name, tau in weights.items()}


def _add(theta: Tensor, tau: Tensor) -> Tensor:
    if not tau.is_floating_point():
        return theta + tau
    return (in_float(theta) + in_float(tau)).to(tau.dtype)


def expert_network(
    parent: Parent, weights: Mapping[str, Tensor], *, device: str, dtype: str
) -> nn.Module:
    """The network of a parent with `weights`, in evaluation mode, without gradients."""
    return assemble(parent.record, weights, str(parent.path), device=device, dtype=dtype).network


def mean_weights(family: Family, shares: Sequence[float]) -> dict[str, Tensor]:
    """sum_i s_i theta_i in float32, and the integers of the base as they are; one expert at a time.

    Equal experts have themselves as their mean, to the last bit. Raises NumericsError naming the
    expert and tensor that are not finite, ArtifactError where an expert has other integers.
    """
    base = load_tensors(family.base.path)
    mean: dict[str, Tensor] = {}
    total = 0.0
    for share, parent in zip(shares, family.parents, strict=True):
        total += share
        for name, tensor in expert_weights(family, parent).items():
            if not tensor.is_floating_point():
                _require_equal(parent, name, tensor, base[name])
                mean[name] = tensor
            elif not tensor.isfinite().all():
                raise NumericsError(f"{parent.path}: {name!r} is not finite; train it again")
            elif name not in mean:
                mean[name] = in_float(tensor).clone()
            elif share:
                mean[name] += share / total * (in_float(tensor) - mean[name])
    return mean


def _require_equal(parent: Parent, name: str, found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):
        raise ArtifactError(
            f"{parent.path}: {name!r} of integers differs from the base; integers cannot be merged"
        )


def in_float(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def round_like_experts(family: Family, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` in the dtypes of the base and of the experts' projections.

    Raises NumericsError naming the tensor that is not finite there.
    """
    rounded = {}
    for name, tensor in expert_weights(family, family.parents[0]).items():
        rounded[name] = weights[name].to(tensor.dtype)
        if tensor.is_floating_point() and not rounded[name].isfinite().all():
            raise NumericsError(f"merging: {name!r} would not be finite in {tensor.dtype}")
    return rounded


def write_merged_weights(
    family: Family,
    weights: Mapping[str, Tensor],
    output: Path,
    *,
    coefficients: Sequence[float],
    method: str,
    settings: dict[str, Any],
    report: dict[str, Any] | None = None,
) -> MergedRecord:
    """Write a merge from data as an artifact of kind merged; returns its record.

    coefficients: what weighed the experts' statistics, in the order of the parents.
    """
    record = merged_record(
        family, coefficients=coefficients, method=method, settings=settings, report=report
    )
    return write_artifact(output, weights, record)
