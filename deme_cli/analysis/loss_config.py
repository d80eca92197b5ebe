"""How much `deme analyze losses` measures. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from deme_cli.settings import Settings, setting


@dataclass(frozen=True)
class LossConfig(Settings):
    """What is measured."""

    buckets: int = setting(50, "parts of [0, T) whose losses are shown")
    num: int = setting(128, "draws (image, timestep, noise) per bucket")
    batch_size: int = setting(256, "draws per forward; changes rounding alone")
    seed: int = setting(0, "seed of the draws")

    def check(self) -> None:
        self._positive("buckets", "num", "batch_size")
        self._not_negative("seed")
