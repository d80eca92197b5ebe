"""Where a landscape goes from its origin: random directions, task vectors, principal directions.

What models span is computed from the inner products of their differences alone: a direction is a
row of `mixing`, d_k = sum_i mixing[k, i] tau_i with tau_i = theta_i - theta_0. Random directions
are those of Li et al. 2018 (section 4): Gaussian, each filter scaled to the norm of the model's.
N models besides the origin, k directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deme_cli.analysis.landscape.subspace import Model, Weights, float_names, inner_products
from deme_cli.errors import ArtifactError
from deme_cli.training.batches import derived_generator

_PARALLEL = 1e-8  # 1 - cosine^2 below which two vectors span no plane (the float32 of weights)


@dataclass(frozen=True)
class Basis:
    """Directions and the models seen from them, of which the first `num_spanning` make them.

    mixing: (k, N)   coordinates: (N, k) of the models' projections, in lengths of the directions
    distances: (N,) L2, of each model from its projection   shares: (k,) of the squared length of
    the tau_i that span, which each direction explains.
    """

    num_spanning: int
    mixing: np.ndarray
    coordinates: np.ndarray
    distances: np.ndarray
    shares: np.ndarray


def basis_of(along: str, models: Sequence[Model], num_spanning: int) -> Basis | None:
    """What goes along `line`, `vectors` or `pca`; None for `random`.

    models: the origin, `num_spanning` - 1 that directions are made of, then those merely seen.
    Raises what the bases below and `inner_products` raise.
    """
    if along == "random":
        return None
    names, products = [model.name for model in models], inner_products(models)
    if along == "pca":
        return principal_basis(products, names, num_spanning - 1)
    return (line_basis if along == "line" else vectors_basis)(products, names)


def line_basis(products: np.ndarray, names: Sequence[str]) -> Basis:
    """From the origin to the first model, which lies at 1.

    products: (N, N), `inner_products`   names: of the origin and the models.
    Raises ArtifactError where the two have the same weights.
    """
    _require_lengths(products, names, 1)
    mixing = np.zeros((1, len(products)))
    mixing[0, 0] = 1
    return _basis(products, mixing, 1)


def vectors_basis(products: np.ndarray, names: Sequence[str]) -> Basis:
    """An orthonormal basis of the plane of the first two tau_i (Gram-Schmidt).

    Raises ArtifactError where they are parallel.
    """
    _require_lengths(products, names, 2)
    lengths = np.sqrt(np.diag(products)[:2])
    cosine = products[0, 1] / lengths.prod()
    if 1 - cosine**2 < _PARALLEL:
        raise ArtifactError(
            f"the task vectors of {names[1]} and {names[2]} span no plane: their cosine is "
            f"{cosine:.6f}; give two different experts, or --along line with two models"
        )
    mixing = np.zeros((2, len(products)))
    mixing[0, 0] = 1 / lengths[0]
    rest = lengths[1] * np.sqrt(1 - cosine**2)
    mixing[1, :2] = -cosine * lengths[1] / lengths[0] / rest, 1 / rest
    return _basis(products, mixing, 2)


def principal_basis(products: np.ndarray, names: Sequence[str], count: int) -> Basis:
    """The two leading principal directions of the first `count` tau_i, not centred.

    The eigenvectors of their Gram matrix, so nothing larger than (N, N) is decomposed; each points
    to where the model lies that is farthest along it. Raises ArtifactError where all are parallel.
    """
    _require_lengths(products, names, count)
    values, vectors = np.linalg.eigh(products[:count, :count])
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    if values[1] < _PARALLEL * values[0]:
        raise ArtifactError(
            f"{', '.join(names[1 : count + 1])} lie on one line through {names[0]}, so they span "
            f"no plane; give other models, or --along line with two of them"
        )
    mixing = np.zeros((2, len(products)))
    mixing[:, :count] = (vectors / np.sqrt(values)).T
    coordinates = products[:, :count] @ mixing[:, :count].T
    farthest = np.abs(coordinates[:count]).argmax(axis=0)
    mixing *= np.sign(coordinates[farthest, [0, 1]])[:, None]
    return _basis(products, mixing, count)


def _basis(products: np.ndarray, mixing: np.ndarray, count: int) -> Basis:
    """The projections on orthogonal directions, which the first `count` models span."""
    squares = np.diag(mixing @ products @ mixing.T)  # of the directions' lengths
    coordinates = products @ mixing.T / squares
    own = np.diag(products)
    rest = own - (coordinates**2 * squares).sum(axis=1)
    distances = np.sqrt(np.where(rest > 1e-12 * own, rest, 0.0))
    shares = (coordinates[:count] ** 2 * squares).sum(axis=0) / own[:count].sum()
    return Basis(count, mixing, coordinates, distances, shares)


def _require_lengths(products: np.ndarray, names: Sequence[str], count: int) -> None:
    """Check that the first `count` models differ from the origin; raises ArtifactError."""
    for name, square in zip(names[1:], np.diag(products)[:count], strict=False):
        if square == 0:
            raise ArtifactError(
                f"{name} has the weights of {names[0]}, so there is no direction from one to the "
                f"other; give another model"
            )


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
        scale = norms_of_filters(theta) / norms_of_filters(drawn)
        scale = torch.from_numpy(scale).float().view(-1, *[1] * (theta.ndim - 1))
        direction[name] = drawn * scale
    return direction


def norms_of_filters(tensor: Tensor) -> np.ndarray:
    """The L2 norm of each slice along the first dimension: (len(tensor),) float64."""
    rows = tensor.reshape(len(tensor), -1).numpy()
    return np.array([np.sqrt(np.square(row, dtype=np.float64).sum()) for row in rows])


def cosine(first: Weights, second: Weights) -> float:
    """The cosine of two directions, summed in float64."""

    def product(a: Weights, b: Weights) -> float:
        pairs = ((a[name].double().numpy(), b[name].double().numpy()) for name in a)
        return float(sum((one * other).sum() for one, other in pairs))

    return product(first, second) / (product(first, first) * product(second, second)) ** 0.5
