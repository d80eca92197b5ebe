"""How the features of one block differ between two networks: in channels, in places, in neither.

After every block, where the paper puts its projections, features are taken as (B, C, P): B draws, C
channels, P places; tokens of transformers are places. Delta = F_expert - F_base of one draw is
taken apart (two-way analysis of variance) as

    Delta_cp = mu + alpha_c + beta_p + eps_cp

The paper's figure 2 shows the spread of mu + alpha_c, the mean over places (channel activation),
beside that of mu + beta_p, the mean over channels (spatial activation). Of independent numbers a
mean over P places keeps 1/P of the variance, one over C channels 1/C, so noise alone gives spreads
in the ratio sqrt(C / P). The components of variance are free of that: the mean squares have
E MS_c = P sigma_c^2 + sigma_e^2, E MS_p = C sigma_p^2 + sigma_e^2 and E MS_e = sigma_e^2
(Scheffe 1959, ch. 7). eps counts as independent: what varies smoothly over the places of a channel
leans to channels. And a convolution does the same at every place: weights changed at random move
channels, too, so controls with random changes stand beside every expert.

A change in neither can still be the paper's channel-wise map W F (section 3.2), whose effect at a
place depends on the features there; so W is fitted, and its R^2 told on other draws.
n draws of all. Sums are float64 and add up over batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deme_cli.diffusion.projection import PREFIX, Site, attach_projections, has_projections, sites
from deme_cli.training.batches import derived_generator

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
PARTS = ("channel", "place", "rest")
_FIT, _TEST = "fit", "test"  # what the draws are for
_SMALLEST = 1e-10  # eigenvalues below this share of the largest are taken for 0


@contextmanager
def listening(
    network: nn.Module, places: Sequence[Site], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While open, `take(path, features)` what comes out of each block, its projection included."""

    def hook_of(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            take(site.path, output[site.output] if isinstance(output, tuple) else output)

        return hook

    handles = [
        network.get_submodule(site.path).register_forward_hook(hook_of(site)) for site in places
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_places(features: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Maps (B, C, H, W) or tokens (B, P, C) as (B, C, P) float64, and rows and columns of places.

    shape: of x_t, whose aspect tokens have; those that do not fill such a grid make one row. Stays
    on the device where that has float64.
    """
    device = "cpu" if features.device.type == "mps" else features.device
    features = features.to(device).double()
    if features.ndim == 4:
        return features.flatten(2), (features.shape[2], features.shape[3])
    num = features.shape[1]
    rows = max(round((num * shape[1] / shape[2]) ** 0.5), 1)
    return features.transpose(1, 2), (rows, num // rows) if num % rows == 0 else (1, num)


def randomly_changed(base: nn.Module, expert: nn.Module, *, seed: int, k: int) -> nn.Module:
    """A new network theta + n_k, n_k Gaussian, each tensor's with the norm of the expert's change.

    Block projections that only one of the networks has are the identity in the other. The noise of
    a tensor depends on (seed, k, its name) alone, and is drawn on the CPU whatever the device. In
    half precision the sum is rounded, so that of a very small change less may be left.
    """
    changed = copy.deepcopy(expert)
    before, after = base.state_dict(), expert.state_dict()
    if has_projections(before) and not has_projections(after):
        attach_projections(changed, "block")
        changed.to(next(expert.parameters()))
    for name, tensor in changed.state_dict().items():
        if tensor.is_floating_point():
            theta = _known(before, name, tensor)
            change = _known(after, name, tensor) - theta
            generator = derived_generator(seed, "random change", k, name)
            noise = torch.randn(change.shape, generator=generator)
            tensor.copy_(theta + noise * (change.norm() / noise.norm()))
    return changed.requires_grad_(False)


def _known(weights: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor as float32 on the CPU; the identity for a projection that a network lacks."""
    return weights[name].float().cpu() if name in weights else torch.eye(len(like))


def projection_distances(network: nn.Module) -> dict[str, dict[str, float]]:
    """|W - I|_F / |I|_F of each block's own projection and the largest singular value of W - I.

    {} where there are none: those trained as `fold` are part of other layers.
    """
    parameters, distances = dict(network.named_parameters()), {}
    for site in sites(network, "block"):
        weight = parameters.get(f"{PREFIX}.{site.path.replace('.', '_')}.weight")
        if weight is not None:
            matrix = weight.detach().cpu().double()
            difference = matrix - torch.eye(len(matrix), dtype=matrix.dtype)
            distances[site.path] = {
                "relative": float(difference.norm()) / len(matrix) ** 0.5,
                "largest": float(torch.linalg.matrix_norm(difference, ord=2)),
            }
    return distances


def block_sums(base: Tensor, delta: Tensor, fitted: Tensor | None = None) -> dict[str, Tensor]:
    """The sums over a batch that `block_change` takes.

    base, delta: (B, C, P) float64   fitted: V (C, C), whose residual is added up; without it what
    it is fitted by.
    """
    use = _FIT if fitted is None else _TEST
    channel, place, mu = delta.mean(2), delta.mean(1), delta.mean((1, 2))
    _, num_channels, num_places = delta.shape
    of_mean = num_channels * num_places * mu.square()
    of_channel = num_places * (channel - mu[:, None]).square().sum(1)
    of_place = num_channels * (place - mu[:, None]).square().sum(1)
    rest = (delta.square().sum((1, 2)) - of_mean - of_channel - of_place).clamp(min=0)
    product, power = base * delta, base.square()
    sums = {
        "channel_base": base.mean(2).sum(0), "channel_change": channel.sum(0),
        "place_base": base.mean(1).sum(0), "place_change": place.sum(0),
        "base_moments": torch.stack([base.sum(), power.sum()]),
        "squares": torch.stack([of_mean, of_channel, of_place, rest]).sum(1),
        f"channel_gain_{use}": torch.stack([product.sum((0, 2)), power.sum((0, 2))]),
        f"place_gain_{use}": torch.stack([product.sum((0, 1)), power.sum((0, 1))]),
    }  # fmt: skip
    features, change = (x.transpose(0, 1).flatten(1) for x in (base, delta))  # (C, B P)
    if fitted is None:
        return sums | {"gram": features @ features.T, "cross": change @ features.T}
    residual = (change - fitted @ features).square().sum()
    return sums | {"residual": torch.stack([residual, change.square().sum()])}


def fit_map(gram: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """V = W - I (C, C) with the least squares |Delta - V F|^2, of smallest norm.

    gram: sum F F^T   cross: sum Delta F^T.   Channels are brought to one scale first.
    """
    scale = np.sqrt(np.diag(gram))
    scale = np.where(scale > 0, scale, 1.0)
    values, vectors = np.linalg.eigh(gram / np.outer(scale, scale))
    kept = values > _SMALLEST * max(values[-1], 0.0)
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    return (cross / scale) @ inverse / scale


def block_change(
    name: str, sums: Mapping[str, np.ndarray], num: int, grid: tuple[int, int],
    projection: dict[str, float] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """What the sums over `num` draws say of a block, and its maps; nan where it cannot be told.

    size: root mean square of Delta in `base_sd`, the standard deviation of F_base. shift: share of
    the mean square of Delta that mu has. components: sigma^2 in base_sd^2, negative where the means
    vary less than those of independent numbers; shares: of their sum, negative ones counted as 0.
    fixed: share of the channel (and place) effect that is the same in every draw. difference: of
    channel (C,) and spatial (P,) activations, means over draws in base_sd, sd_per_draw within a
    draw. averaging_ratio: sqrt(C / P), of the spreads of independent noise. explained: R^2 of Delta
    (not centred) on draws that nothing was fitted to, by V F with V = W - I, by v_c F_cp (C
    numbers), by v_p F_cp (P numbers). The maps are means over draws, in the network's units.
    """
    maps = {
        key: sums[key] / num
        for key in ("channel_base", "channel_change", "place_base", "place_change")
    }
    num_channels, num_places = len(maps["channel_base"]), len(maps["place_base"])
    size = num * num_channels * num_places
    mean, square = sums["base_moments"] / size
    variance = max(float(square - mean * mean), 0.0)
    sd = math.sqrt(variance)
    of_mean, of_channel, of_place, rest = sums["squares"] / num
    total = of_mean + of_channel + of_place + rest
    components = _components(of_channel, of_place, rest, num_channels, num_places)
    positive = [part if math.isnan(part) else max(part, 0.0) for part in components]
    effects = {
        "channel": (of_channel, num_places, components[0]),
        "place": (of_place, num_channels, components[1]),
    }
    row = {
        "name": name, "channels": num_channels, "places": num_places, "grid": grid,
        "base_sd": sd, "size": math.sqrt(_ratio(total * num / size, variance)),
        "shift": _ratio(of_mean, total),
        "components": _parts(_ratio(part, variance) for part in components),
        "shares": _parts(_ratio(part, sum(positive)) for part in positive),
        "fixed": {
            key: _fixed(maps[f"{key}_change"], of / averaged, component, num)
            for key, (of, averaged, component) in effects.items()
        },
        "difference": {
            key: _difference(maps[f"{key}_change"], sd, _ratio(of * num / size, variance))
            for key, (of, *_) in effects.items()
        },
        "averaging_ratio": math.sqrt(num_channels / num_places),
        "explained": _explained(sums), "projection": projection,
    }  # fmt: skip
    return row, {"name": name, "grid": grid, **maps}


def _parts(values: Iterator[float]) -> dict[str, float]:
    return dict(zip(PARTS, values, strict=True))


def _difference(change: np.ndarray, sd: float, spread: float) -> dict[str, Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        values = change / sd
    quantiles = np.quantile(values, QUANTILES).tolist()
    return {"sd": float(values.std()), "sd_per_draw": math.sqrt(spread), "quantiles": quantiles}


def _components(
    of_channel: float, of_place: float, rest: float, num_channels: int, num_places: int
) -> tuple[float, float, float]:
    """sigma_c^2, sigma_p^2, sigma_e^2 from the sums of squares of one draw, unbiased."""
    degrees = num_channels - 1, num_places - 1
    if 0 in degrees:
        return (math.nan,) * 3
    noise = rest / degrees[0] / degrees[1]
    channel = (of_channel / degrees[0] - noise) / num_places
    return channel, (of_place / degrees[1] - noise) / num_channels, noise


def _fixed(change: np.ndarray, mean_square: float, component: float, num: int) -> float:
    """The share of an effect that is the same in every draw.

    change: mean of mu + alpha over draws   mean_square: mean of |alpha|^2   component: sigma_c^2.
    The mean of alpha_i . alpha_j over pairs of draws, over what |alpha|^2 is without noise.
    """
    of_mean = float(np.square(change - change.mean()).sum())
    pairs = (num * of_mean - mean_square) / (num - 1)
    share = _ratio(pairs, (len(change) - 1) * component)
    return share if math.isnan(share) else min(max(share, 0.0), 1.0)


def _explained(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    residual, total = sums["residual"]
    gains = []
    for key in ("channel_gain", "place_gain"):
        product, power = sums[f"{key}_{_FIT}"]
        gain = np.divide(product, power, out=np.zeros_like(power), where=power > 0)
        product, power = sums[f"{key}_{_TEST}"]
        gains.append(_ratio(float((2 * gain * product - gain * gain * power).sum()), total))
    values = (_ratio(total - residual, total), *gains)
    return dict(zip(("channel_map", "channel_gain", "place_gain"), values, strict=True))


def _ratio(part: float, whole: float) -> float:
    """part / whole, nan where there is nothing to divide by."""
    return float(part / whole) if whole > 0 else math.nan
