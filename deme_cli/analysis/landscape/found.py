"""What a landscape shows: its losses, its lowest points, its slopes at the origin, its models.

k axes, G groups: all timesteps, then each range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deme_cli.analysis.landscape.grid import Index, at_origin
from deme_cli.timesteps import TimestepRange


@dataclass(frozen=True)
class Pick:
    """A point of the grid that was picked, and by how much it differs, measured on fresh draws.

    loss: as it was picked   difference, interval: on fresh draws, +- 95 %   reference: the loss
    there that it differs from.
    """

    index: Index
    coordinates: tuple[float, ...]
    at_edge: bool
    loss: float
    difference: float
    interval: float
    reference: float

    @property
    def percent(self) -> float:
        return 100 * self.difference / self.reference

    @property
    def percent_interval(self) -> float:
        return 100 * self.interval / self.reference

    @property
    def is_lower(self) -> bool:
        """Lower than the reference by more than chance."""
        return self.difference + self.interval < 0

    @property
    def is_higher(self) -> bool:
        return self.difference - self.interval > 0

    @property
    def shown(self) -> str:
        """As `-1.9 ± 0.3 %`."""
        return f"{signed(self.percent)} ± {digits(self.percent_interval)} %"

    def row(self, span: TimestepRange) -> dict[str, Any]:
        return {
            "timesteps": str(span), "coordinates": list(self.coordinates), "loss": self.loss,
            "at_edge": self.at_edge, "difference": self.difference, "interval": self.interval,
            "percent": self.percent, "percent_interval": self.percent_interval,
        }  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A model: its projection, its L2 distance from that, and its own loss.

    losses: (G,), of itself, not of its projection   percent, interval: (G,) against the origin's
    """

    name: str
    coordinates: tuple[float, ...]
    distance: float
    losses: np.ndarray
    percent: np.ndarray
    interval: np.ndarray


@dataclass(frozen=True)
class Landscape:
    """What was measured; a loss that was not finite is nan.

    axes: k arrays   losses: (G, points, ...)
    On fresh draws, counts (G,) of them:   origin: (G,)
    slopes: (G, k), at the origin per unit of an axis, +- `slope_intervals`
    steepness: (G,) the length of the slope in per cent of the loss per unit, +- its interval
    lowest: of each group, against the origin   barriers: of each group on a line, against the
    straight line between the losses of its ends   models: the origin first.
    """

    along: str
    groups: list[TimestepRange]
    counts: np.ndarray
    axes: list[np.ndarray]
    losses: np.ndarray
    origin: np.ndarray
    slopes: np.ndarray
    slope_intervals: np.ndarray
    steepness: np.ndarray
    steepness_intervals: np.ndarray
    lowest: list[Pick]
    barriers: list[Pick]
    models: list[Seen]

    @property
    def percent(self) -> np.ndarray:
        """Losses against the origin's, in per cent: (G, points, ...)."""
        origin = at_origin(self.losses, self.axes)
        return 100 * (self.losses / origin.reshape(-1, *[1] * len(self.axes)) - 1)

    @property
    def num_not_finite(self) -> int:
        """Points where the loss of some group is not finite."""
        return int((~np.isfinite(self.losses)).any(axis=0).sum())

    def rows(self) -> dict[str, Any]:
        """What the JSON document holds of it."""
        spans = list(map(str, self.groups))
        columns = (
            spans, self.counts, self.origin, self.slopes, self.slope_intervals, self.steepness,
            self.steepness_intervals,
        )  # fmt: skip
        names = (
            "timesteps", "draws", "loss", "slope", "slope_interval", "slope_percent",
            "slope_percent_interval",
        )  # fmt: skip
        return {
            "origin": [
                {name: _listed(value) for name, value in zip(names, row, strict=True)}
                for row in zip(*columns, strict=True)
            ],
            "lowest": _pick_rows(self.groups, self.lowest),
            **({"barriers": _pick_rows(self.groups, self.barriers)} if self.barriers else {}),
            "models": [
                {
                    "name": seen.name, "coordinates": list(seen.coordinates),
                    "distance_from_landscape": seen.distance,
                    "losses": seen.losses.tolist(), "percent": seen.percent.tolist(),
                    "percent_interval": seen.interval.tolist(),
                }
                for seen in self.models
            ],
            "losses": [
                {"timesteps": span, "loss": loss.tolist()}
                for span, loss in zip(spans, self.losses, strict=True)
            ],
        }  # fmt: skip


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _pick_rows(groups: Sequence[TimestepRange], picks: Sequence[Pick]) -> list[dict[str, Any]]:
    return [pick.row(span) for span, pick in zip(groups, picks, strict=True)]


def digits(value: float) -> str:
    """A number with two digits that count, without exponents: 0.031, 1.2, 140."""
    if not np.isfinite(value) or value == 0:
        return "0" if value == 0 else "-"
    decimals = max(0, 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{min(decimals, 6)}f}"


def signed(value: float) -> str:
    return f"+{digits(value)}" if value > 0 else digits(value)
