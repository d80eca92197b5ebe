"""The bar of the caches: what they lack is made before a command's own work begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.distributed import ALONE, World

if TYPE_CHECKING:
    from deme_cli.training.examples import Examples


def fill_with_bar(*examples: Examples | None, world: World = ALONE) -> None:
    """Make what the caches of latents behind these examples lack, if they have any."""
    from deme_cli.training.examples import cache_size, fill_caches

    if total := cache_size(*examples):
        with console.progress("caching latents", total, "image") as bar:
            for done in fill_caches(*examples, world=world):
                bar.advance(done)
