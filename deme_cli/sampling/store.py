"""What is to be stored, and the rule of keeping it: what is finished stays, nothing is mixed.

Images go into one `samples` artifact (`samples_file`) or a folder of PNG files (`samples_folder`).
Both keep what is finished, so that the same command goes on where it stopped, after Ctrl-C, a
signal or a crash. Nothing is kept that another protocol drew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_cli.errors import ConfigError


@dataclass(frozen=True)
class Order:
    """Images 0 .. card["num"] - 1 of `shape`, drawn under the protocol `card`, to go to `path`.

    `prompts` and `classes`, where images have them, are kept beside: one per image.
    """

    path: Path
    card: dict[str, Any]
    shape: tuple[int, int, int]  # (H, W, C)
    batch_size: int
    force: bool = False
    prompts: list[str] | None = None
    classes: list[int] | None = None

    @property
    def num(self) -> int:
        return self.card["num"]

    @property
    def image_bytes(self) -> int:
        return math.prod(self.shape)

    def kept(self, num_images: int) -> int:
        """Of `num_images` found, how many need not be drawn again: all, or whole batches.

        Whole batches, because then a resumed run equals an uninterrupted one bit for bit.
        """
        if num_images >= self.num:
            return self.num
        return num_images // self.batch_size * self.batch_size

    def is_same(self, card: dict[str, Any]) -> bool:
        """Whether `card` promises the images of this order, however many."""
        return first_difference(self.card, card) is None

    def require_same(self, card: dict[str, Any], where: Path) -> None:
        """Check that the card found at `where` promises the images of this order."""
        name = first_difference(self.card, card)
        if name is not None:
            raise ConfigError(
                f"{where}: holds images with {name} = {card.get(name)}, this run has "
                f"{self.card.get(name)}; run the command that began it, choose another --output, "
                f"or add --force to discard them"
            )


def first_difference(card: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first field in which two cards promise different images, or None.

    How many images there are, what the model was imported from and where prompts lie are left out.
    """
    for name in [*card, *other]:
        if name not in ("num", "source", "prompts") and card.get(name) != other.get(name):
            return name
    return None


def card_in(text: bytes) -> dict[str, Any] | None:
    """The protocol card in JSON that lies beside images; None where there is no whole one."""
    try:
        card = json.loads(text)["protocol"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return card if isinstance(card, dict) else None


def is_folder(path: Path) -> bool:
    """Whether an output means a folder of PNG files: it is one, or has no .safetensors suffix."""
    return path.is_dir() or path.suffix != ".safetensors"
