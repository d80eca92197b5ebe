"""A line or a plane in the space of weights, and models seen from it.

theta(c) = theta_0 + sum_k c_k d_k, with one direction d or two. What lies in memory: theta_0 and
the directions in float32 on the device, and the network that is moved. Models read from artifacts
are mapped from their files, not copied. A block projection that only some of the models have counts
as the identity in the others; what is no floating-point tensor stays that of the origin.
N models besides the origin, k directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deme_cli.analysis.lineup import Entrant, require_alike
from deme_cli.artifacts import load_tensors, read_record
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.locate import locate_model
from deme_cli.diffusion.projection import PREFIX, attach_projections, has_projections
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.records import DenoiserRecord

Weights = Mapping[str, Tensor]
_PIECE = 1 << 20  # elements of each model that a sum of products holds at a time


@dataclass(frozen=True)
class Model:
    """A model by the name that figures give it: its record and its weights on the CPU."""

    name: str
    argument: str
    record: DenoiserRecord
    weights: Weights


def open_models(arguments: Sequence[str]) -> list[Model]:
    """The models that these arguments name, the origin first, all with the same parameters.

    Raises what `locate_model` raises, ArtifactError naming what differs first.
    """
    stems = [Path(argument).stem for argument in arguments]
    names = stems if len(set(stems)) == len(stems) else list(arguments)
    models = [
        Model(name, argument, *read_weights(argument))
        for name, argument in zip(names, arguments, strict=True)
    ]
    require_alike([Entrant(one.name, one.record.kind, (), [one.record]) for one in models])
    if has_any_projections(models):
        projections = {
            name: tensor for one in models for name, tensor in one.weights.items()
            if has_projections([name])
        }  # fmt: skip
        models = [
            Model(one.name, one.argument, one.record, with_identities(one.weights, projections))
            for one in models
        ]
    for other in models[1:]:
        _require_same(models[0], other)
    return models


def has_any_projections(models: Sequence[Model]) -> bool:
    """Whether one of the models has block projections."""
    return any(has_projections(one.weights) for one in models)


def read_weights(argument: str) -> tuple[DenoiserRecord, Weights]:
    """The record and the weights of a model; those of an artifact are mapped, not copied."""
    place = locate_model(argument)
    if place.is_file():
        return read_record(place, "base", "expert", "merged"), load_tensors(place)
    denoiser = open_denoiser(argument)
    return denoiser.record, denoiser.network.state_dict()


def with_identities(weights: Weights, wanted: Weights) -> Weights:
    """`weights` with the identity for every block projection of `wanted` that they lack."""
    lacking = {name: like for name, like in wanted.items() if name not in weights}
    eyes = {name: torch.eye(len(like)) for name, like in lacking.items() if has_projections([name])}
    return {**weights, **eyes}


def open_origin(argument: str, *, with_projections: bool, device: str) -> Denoiser:
    """The network of a model, with block projections where others of its landscape have them."""
    denoiser = open_denoiser(argument, device=device)
    if with_projections and not has_projections(denoiser.network.state_dict()):
        attach_projections(denoiser.network, "block")
        added = denoiser.network.get_submodule(PREFIX)
        added.to(denoiser.device, denoiser.dtype).requires_grad_(False)
    return denoiser


def _require_same(origin: Model, other: Model) -> None:
    """Check names and shapes; raises ArtifactError with the first name that disagrees."""
    for name in sorted(origin.weights.keys() | other.weights.keys()):
        for has, lacks in ((origin, other), (other, origin)):
            if name not in lacks.weights:
                raise ArtifactError(
                    f"{lacks.argument}: lacks {name!r}, which {has.argument} has; a landscape "
                    f"needs models of one shape"
                )
        expected, found = (list(one.weights[name].shape) for one in (origin, other))
        if expected != found:
            raise ArtifactError(
                f"{other.argument}: {name!r} has shape {found}, {origin.argument} has {expected}; "
                f"a landscape needs models of one shape"
            )


def inner_products(models: Sequence[Model]) -> np.ndarray:
    """<theta_i - theta_0, theta_j - theta_0>: (N, N) float64, by pairwise sums.

    (These do not depend on the number of threads, as a matrix product does.) Raises NumericsError
    naming a model that is not finite.
    """
    origin, others = models[0], models[1:]
    products = np.zeros((len(others), len(others)))
    for name in float_names(origin.weights):
        for part in _pieces(origin.weights[name].numel()):
            theta, *rows = (_numbers(one.weights[name], part) for one in models)
            with np.errstate(invalid="ignore", over="ignore"):
                rows = [row - theta for row in rows]
                for i, row in enumerate(rows):
                    for j in range(i + 1):
                        products[i, j] += (row * rows[j]).sum()
    for other, square in zip(others, np.diag(products), strict=True):
        if not np.isfinite(square):
            raise NumericsError(
                f"{other.argument}: its weights, or those of {origin.argument}, are not finite"
            )
    return np.tril(products) + np.tril(products, -1).T


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, size, _PIECE))


def _numbers(tensor: Tensor, part: slice) -> np.ndarray:
    return tensor.detach().reshape(-1)[part].cpu().double().numpy()


def float_names(weights: Weights) -> list[str]:
    """The names of what can be moved, sorted."""
    return sorted(name for name, tensor in weights.items() if tensor.is_floating_point())


@dataclass(frozen=True)
class Subspace:
    """theta_0 and directions, in float32 on one device; a name that directions lack stays put."""

    origin: Weights
    directions: tuple[Weights, ...]

    @torch.no_grad()
    def put(self, network: nn.Module, coordinates: Sequence[float]) -> None:
        """Give `network` the weights theta(c), summed in float32.

        At c = 0 they are the origin's, bit for bit.
        """
        own = network.state_dict()
        for name, theta in self.origin.items():
            total = theta
            for c, direction in zip(coordinates, self.directions, strict=True):
                if name in direction:
                    total = total.add(direction[name], alpha=c)
            own[name].copy_(total)


def subspace_of(network: nn.Module, directions: Sequence[Weights]) -> Subspace:
    """The line or plane from the weights that `network` has, which are copied."""
    own = network.state_dict()
    origin = {name: own[name].detach().float().clone() for name in float_names(own)}
    return Subspace(origin, tuple(directions))


@torch.no_grad()
def mixed_directions(
    network: nn.Module, arguments: Sequence[str], mixing: np.ndarray
) -> list[dict[str, Tensor]]:
    """d_k = sum_i mixing[k, i] (theta_i - theta_0), in float32 on the network's device.

    network: with the weights theta_0.   arguments: of the N models   mixing: (k, N)
    """
    own = network.state_dict()
    origin = {name: own[name].detach().float() for name in float_names(own)}
    directions = [{name: torch.zeros_like(one) for name, one in origin.items()} for _ in mixing]
    for argument, column in zip(arguments, mixing.T.tolist(), strict=True):
        if any(column):
            weights = with_identities(read_weights(argument)[1], own)
            for name, theta in origin.items():
                difference = weights[name].to(theta.device).float() - theta
                for direction, share in zip(directions, column, strict=True):
                    direction[name].add_(difference, alpha=share)
    return directions
