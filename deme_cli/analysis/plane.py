"""A plane in the space of weights, and models seen from it: theta(c) = theta_0 + c_1 d_1 + c_2 d_2.

Random directions are those of Li et al. 2018 (section 4): Gaussian, each filter scaled to the norm
of the model's. The plane of two task vectors is computed from the inner products of the models'
differences alone: a direction is a row of `mixing`, d_k = sum_i mixing[k, i] tau_i with
tau_i = theta_i - theta_0. What lies in memory: theta_0 and the directions in float32 on the device,
and the network that is moved. Models read from artifacts are mapped from their files. A block
projection that only some of the models have counts as the identity in the others; what is no
floating-point tensor stays that of the origin.
N models besides the origin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deme_cli.analysis.models import require_alike
from deme_cli.artifacts import DenoiserRecord, load_tensors, read_record
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.model_files import locate_model
from deme_cli.diffusion.projection import PREFIX, attach_projections, has_projections
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.training.batches import derived_generator

Weights = Mapping[str, Tensor]
_PIECE = 1 << 20  # elements of each model that a sum of products holds at a time
_PARALLEL = 1e-8  # 1 - cosine^2 below which two vectors span no plane (the float32 of weights)


@dataclass(frozen=True)
class WeightsOf:
    """A model by the name that figures give it: its record and its weights on the CPU."""

    name: str
    argument: str
    record: DenoiserRecord
    weights: Weights


def read_models(arguments: Sequence[str], *, pipeline: str | None = None) -> list[WeightsOf]:
    """The models that these arguments name, the origin first, all with the same parameters.

    Raises what `locate_model` raises, ArtifactError naming what differs first.
    """
    stems = [Path(argument).stem for argument in arguments]
    names = stems if len(set(stems)) == len(stems) else list(arguments)
    models = []
    for name, argument in zip(names, arguments, strict=True):
        place = locate_model(argument)
        if place.is_file():
            record = read_record(place, "base", "expert", "merged")
            models.append(WeightsOf(name, argument, record, load_tensors(place)))
        else:
            denoiser = open_denoiser(argument, pipeline=pipeline)
            weights = denoiser.network.state_dict()
            models.append(WeightsOf(name, argument, denoiser.record, weights))
    require_alike([(model.name, model.record) for model in models])
    wanted = {n: w for model in models for n, w in model.weights.items() if has_projections([n])}
    models = [replace(one, weights=_with_identities(one.weights, wanted)) for one in models]
    for other in models[1:]:
        _require_same(models[0], other)
    return models


def _with_identities(weights: Weights, wanted: Weights) -> Weights:
    """`weights` with the identity for every block projection of `wanted` that they lack."""
    eyes = {name: torch.eye(len(like)) for name, like in wanted.items() if name not in weights}
    return {**weights, **eyes}


def _require_same(origin: WeightsOf, other: WeightsOf) -> None:
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


def open_origin(origin: WeightsOf, *, device: str, pipeline: str | None = None) -> Denoiser:
    """The network of the origin, with block projections where others have them."""
    denoiser = open_denoiser(origin.argument, pipeline=pipeline, device=device)
    if has_projections(origin.weights) and not has_projections(denoiser.network.state_dict()):
        attach_projections(denoiser.network, "block")
        added = denoiser.network.get_submodule(PREFIX)
        added.to(denoiser.device, denoiser.dtype).requires_grad_(False)
    return denoiser


def float_names(weights: Weights) -> list[str]:
    """The names of what can be moved, sorted."""
    return sorted(name for name, tensor in weights.items() if tensor.is_floating_point())


def inner_products(models: Sequence[WeightsOf]) -> np.ndarray:
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


@dataclass(frozen=True)
class Basis:
    """Two orthonormal directions, and the models seen from them; the first two make them.

    mixing: (2, N)   coordinates: (N, 2) of the models' projections   distances: (N,) L2, of each
    model from its projection   shares: (2,) of the squared length of the tau_i that span.
    """

    mixing: np.ndarray
    coordinates: np.ndarray
    distances: np.ndarray
    shares: np.ndarray


def vectors_basis(models: Sequence[WeightsOf]) -> Basis:
    """An orthonormal basis of the plane of the first two tau_i (Gram-Schmidt).

    Raises ArtifactError where they are parallel or one is zero, and what `inner_products` raises.
    """
    names, products = [model.name for model in models], inner_products(models)
    for name, square in zip(names[1:3], np.diag(products)[:2], strict=True):
        if square == 0:
            raise ArtifactError(
                f"{name} has the weights of {names[0]}, so there is no direction from one to the "
                f"other; give another model"
            )
    lengths = np.sqrt(np.diag(products)[:2])
    cosine = products[0, 1] / lengths.prod()
    if 1 - cosine**2 < _PARALLEL:
        raise ArtifactError(
            f"the task vectors of {names[1]} and {names[2]} span no plane: their cosine is "
            f"{cosine:.6f}; give two different experts"
        )
    mixing = np.zeros((2, len(products)))
    mixing[0, 0] = 1 / lengths[0]
    rest = lengths[1] * np.sqrt(1 - cosine**2)
    mixing[1, :2] = -cosine * lengths[1] / lengths[0] / rest, 1 / rest
    squares = np.diag(mixing @ products @ mixing.T)  # of the directions' lengths
    coordinates, own = products @ mixing.T / squares, np.diag(products)
    beyond = own - (coordinates**2 * squares).sum(axis=1)
    distances = np.sqrt(np.where(beyond > 1e-12 * own, beyond, 0.0))
    shares = (coordinates[:2] ** 2 * squares).sum(axis=0) / own[:2].sum()
    return Basis(mixing, coordinates, distances, shares)


def random_direction(weights: Weights, seed: int, axis: int) -> dict[str, Tensor]:
    """A Gaussian direction, filter-normalised: each filter as long as the model's (Li et al. 2018).

    A filter is a slice along the first dimension of a tensor of two dimensions or more; biases and
    the scales of norms (one dimension) are not moved. Each tensor has its own seed, made of `seed`,
    `axis` and its name. Two directions are not made orthogonal: in a space of n dimensions their
    cosine is about 1 / sqrt(n). Float32 on the CPU.
    """
    direction = {}
    for name in float_names(weights):
        theta = weights[name].detach().cpu().float()
        if theta.ndim < 2:
            continue
        generator = derived_generator(seed, "landscape", axis, name)
        drawn = torch.randn(theta.shape, generator=generator)
        scale = torch.from_numpy(_filter_norms(theta) / _filter_norms(drawn)).float()
        direction[name] = drawn * scale.view(-1, *[1] * (theta.ndim - 1))
    return direction


def _filter_norms(tensor: Tensor) -> np.ndarray:
    """The L2 norm of each slice along the first dimension: (len(tensor),) float64."""
    rows = tensor.reshape(len(tensor), -1).numpy()
    return np.array([np.sqrt(np.square(row, dtype=np.float64).sum()) for row in rows])


def cosine(first: Weights, second: Weights) -> float:
    """The cosine of two directions, summed in float64."""

    def product(a: Weights, b: Weights) -> float:
        pairs = ((a[name].double().numpy(), b[name].double().numpy()) for name in a)
        return float(sum((one * other).sum() for one, other in pairs))

    return product(first, second) / (product(first, first) * product(second, second)) ** 0.5


@torch.no_grad()
def mixed_directions(
    network: nn.Module, others: Sequence[WeightsOf], mixing: np.ndarray
) -> list[dict[str, Tensor]]:
    """d_k = sum_i mixing[k, i] (theta_i - theta_0), in float32 on the network's device.

    network: with the weights theta_0.   mixing: (2, N)
    """
    own = network.state_dict()
    origin = {name: own[name].detach().float() for name in float_names(own)}
    directions = [{name: torch.zeros_like(one) for name, one in origin.items()} for _ in mixing]
    for other, column in zip(others, mixing.T.tolist(), strict=True):
        if any(column):
            for name, theta in origin.items():
                difference = other.weights[name].to(theta.device).float() - theta
                for direction, share in zip(directions, column, strict=True):
                    direction[name].add_(difference, alpha=share)
    return directions


class Plane:
    """theta_0, which `network` has now, and two directions, in float32 on one device.

    A name that directions lack stays put.
    """

    def __init__(self, network: nn.Module, directions: Sequence[Weights]) -> None:
        self.network, self.directions = network, directions
        own = network.state_dict()
        self.origin = {name: own[name].detach().float().clone() for name in float_names(own)}

    @torch.no_grad()
    def put(self, coordinates: Sequence[float]) -> None:
        """Give the network the weights theta(c), summed in float32.

        At c = 0 they are the origin's, bit for bit.
        """
        own = self.network.state_dict()
        for name, theta in self.origin.items():
            total = theta
            for c, direction in zip(coordinates, self.directions, strict=True):
                if name in direction:
                    total = total.add(direction[name], alpha=c)
            own[name].copy_(total)

    def put_model(self, weights: Weights) -> None:
        """Give the network those of a model itself, which may lie off the plane."""
        for name, own in self.network.state_dict().items():
            if name in self.origin:
                own.copy_(weights[name])
