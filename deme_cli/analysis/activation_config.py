"""How much `deme analyze activations` measures. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from deme_cli.errors import ConfigError
from deme_cli.settings import Settings, setting


@dataclass(frozen=True)
class ActivationConfig(Settings):
    """What is measured."""

    num: int = setting(256, "draws (image, timestep, noise) that both models see")
    batch_size: int = setting(16, "draws per forward; changes rounding alone")
    controls: int = setting(
        4, "networks with random weight changes of the same size to compare with, 0 for none; each "
        "takes as long as the expert, and fewer tell less"
    )  # fmt: skip
    seed: int = setting(0, "seed of the draws and of the random changes")

    def check(self) -> None:
        self._positive("batch_size")
        self._not_negative("seed", "controls")
        if self.num < 2:
            raise ConfigError(f"num = {self.num}: needs at least 2 draws, one to fit, one to test")
