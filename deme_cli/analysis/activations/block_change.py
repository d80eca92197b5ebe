"""How the features of one block differ between two networks: in channels, in places, in neither.

Delta = F_expert - F_base of one draw is taken apart (two-way analysis of variance) as

    Delta_cp = mu + alpha_c + beta_p + eps_cp

The paper's figure 2 shows the spread of mu + alpha_c, the mean over places (channel activation),
beside that of mu + beta_p, the mean over channels (spatial activation). Of independent numbers a
mean over P places keeps 1/P of the variance, one over C channels 1/C, so noise alone gives spreads
in the ratio sqrt(C / P). The components of variance are free of that: the mean squares have
E MS_c = P sigma_c^2 + sigma_e^2, E MS_p = C sigma_p^2 + sigma_e^2 and E MS_e = sigma_e^2
(Scheffe 1959, ch. 7). eps counts as independent: what varies smoothly over the places of a channel
leans to channels. And a convolution does the same at every place: weights changed at random move
channels, too, so that it is channels says little of what finetuning is about.

A change in neither can still be the paper's channel-wise map W F (section 3.2), whose effect at a
place depends on the features there; so W is fitted, and its R^2 told on other draws.

B draws of a batch, n of all; C channels, P places. Sums are float64 and add up over batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_FIT, _TEST = "fit", "test"  # what the draws are for
_SMALLEST = 1e-10  # eigenvalues below this share of the largest are taken for 0


@dataclass(frozen=True)
class Parts:
    """One number each of channels, places, and what neither explains."""

    channel: float
    place: float
    rest: float


@dataclass(frozen=True)
class Explained:
    """R^2 of Delta (not centred) on draws that nothing was fitted to.

    channel_map: by V F, V = W - I in R^{C x C}. channel_gain: by v_c F_cp, C numbers; place_gain:
    by v_p F_cp, P numbers.
    """

    channel_map: float
    channel_gain: float
    place_gain: float


@dataclass(frozen=True)
class ProjectionDistance:
    """|W - I|_F / |I|_F of a block's own projection, and the largest singular value of W - I."""

    relative: float
    largest: float


@dataclass(frozen=True, eq=False)
class BlockChange:
    """What changed after one block; nan where it cannot be told (no change, one place alone).

    size: root mean square of Delta in `base_sd`, the standard deviation of F_base. shift: share of
    the mean square of Delta that mu has. components: sigma^2 in base_sd^2, negative where the means
    vary less than those of independent numbers; shares: of their sum, negative ones counted as 0.
    fixed: share of the channel (and place) effect that is the same in every draw. spread: standard
    deviation of channel (and spatial) activations' differences within a draw, in base_sd. Means
    over draws, in the network's units: channel_base, channel_change (C,), place_base, place_change
    (P,). grid: rows and columns of the places.
    """

    name: str
    grid: tuple[int, int]
    base_sd: float
    size: float
    shift: float
    components: Parts
    shares: Parts
    fixed: tuple[float, float]
    spread: tuple[float, float]
    explained: Explained
    channel_base: np.ndarray
    channel_change: np.ndarray
    place_base: np.ndarray
    place_change: np.ndarray
    projection: ProjectionDistance | None = None

    @property
    def averaging_ratio(self) -> float:
        """sqrt(C / P): channel spread over spatial spread if Delta were independent noise."""
        return math.sqrt(len(self.channel_base) / len(self.place_base))

    @property
    def differences(self) -> tuple[np.ndarray, np.ndarray]:
        """The differences of channel (C,) and spatial activations (P,), in base_sd."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.channel_change / self.base_sd, self.place_change / self.base_sd

    def row(self) -> dict[str, Any]:
        """The numbers as JSON holds them, but for the maps; differences by their QUANTILES."""
        channel, place = self.differences
        return {
            "name": self.name, "channels": len(channel), "places": len(place), "grid": self.grid,
            "base_sd": self.base_sd, "size": self.size, "shift": self.shift,
            "components": asdict(self.components), "shares": asdict(self.shares),
            "fixed": {"channel": self.fixed[0], "place": self.fixed[1]},
            "difference": {
                name: {"sd": float(values.std()), "sd_per_draw": spread,
                       "quantiles": np.quantile(values, QUANTILES).tolist()}
                for name, values, spread in
                (("channel", channel, self.spread[0]), ("place", place, self.spread[1]))
            },
            "averaging_ratio": self.averaging_ratio,
            "explained": asdict(self.explained),
            "projection": asdict(self.projection) if self.projection else None,
        }  # fmt: skip

    def maps(self) -> dict[str, Any]:
        """The mean activations of base and their change, in the network's units."""
        return {
            "name": self.name, "grid": self.grid,
            "channel_base": self.channel_base, "channel_change": self.channel_change,
            "place_base": self.place_base, "place_change": self.place_change,
        }  # fmt: skip


def block_sums(base: Tensor, delta: Tensor, fitted: Tensor | None = None) -> dict[str, Tensor]:
    """The sums over a batch from which `block_change` tells what changed.

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
    projection: ProjectionDistance | None = None,
) -> BlockChange:  # fmt: skip
    """What the sums over `num` draws say; see `BlockChange`."""
    means = {
        key: sums[key] / num
        for key in ("channel_base", "channel_change", "place_base", "place_change")
    }
    num_channels, num_places = len(means["channel_base"]), len(means["place_base"])
    size = num * num_channels * num_places
    mean, square = sums["base_moments"] / size
    variance = max(float(square - mean * mean), 0.0)
    of_mean, of_channel, of_place, rest = sums["squares"] / num
    total = of_mean + of_channel + of_place + rest
    components = _components(of_channel, of_place, rest, num_channels, num_places)
    changes = (means["channel_change"], means["place_change"])
    return BlockChange(
        name, grid, math.sqrt(variance), math.sqrt(_ratio(total * num / size, variance)),
        shift=_ratio(of_mean, total),
        components=Parts(*(_ratio(part, variance) for part in components)),
        shares=_shares(components),
        fixed=(
            _fixed(changes[0], of_channel / num_places, components[0], num),
            _fixed(changes[1], of_place / num_channels, components[1], num),
        ),
        spread=(
            math.sqrt(_ratio(of_channel * num / size, variance)),
            math.sqrt(_ratio(of_place * num / size, variance)),
        ),
        explained=_explained(sums), projection=projection, **means,
    )  # fmt: skip


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


def _shares(components: tuple[float, float, float]) -> Parts:
    positive = [part if math.isnan(part) else max(part, 0.0) for part in components]
    return Parts(*(_ratio(part, sum(positive)) for part in positive))


def _fixed(change: np.ndarray, mean_square: float, component: float, num: int) -> float:
    """The share of an effect that is the same in every draw.

    change: mean of mu + alpha over draws   mean_square: mean of |alpha|^2   component: sigma_c^2.
    The mean of alpha_i . alpha_j over pairs of draws, over what |alpha|^2 is without noise.
    """
    of_mean = float(np.square(change - change.mean()).sum())
    pairs = (num * of_mean - mean_square) / (num - 1)
    share = _ratio(pairs, (len(change) - 1) * component)
    return share if math.isnan(share) else min(max(share, 0.0), 1.0)


def _explained(sums: Mapping[str, np.ndarray]) -> Explained:
    residual, total = sums["residual"]
    gains = []
    for key in ("channel_gain", "place_gain"):
        product, power = sums[f"{key}_{_FIT}"]
        gain = np.divide(product, power, out=np.zeros_like(power), where=power > 0)
        product, power = sums[f"{key}_{_TEST}"]
        gains.append(_ratio(float((2 * gain * product - gain * gain * power).sum()), total))
    return Explained(_ratio(total - residual, total), *gains)


def _ratio(part: float, whole: float) -> float:
    """part / whole, nan where there is nothing to divide by."""
    return float(part / whole) if whole > 0 else math.nan
