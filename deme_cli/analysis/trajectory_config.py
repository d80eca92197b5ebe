"""How much `deme analyze trajectory` draws. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from deme_cli.settings import Settings, setting


@dataclass(frozen=True)
class TrajectoryConfig(Settings):
    """What is denoised and shown; how, the settings of [sample] say."""

    num: int = setting(16, "images that the distances are measured on")
    shown: int = setting(10, "steps shown, evenly from noise to image")
    rows: int = setting(1, "images shown, the first of them")

    def check(self) -> None:
        self._positive("num", "shown", "rows")
