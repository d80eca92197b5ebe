"""Fetch the files that measuring needs, with a bar, where their hosts can be reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deme_cli import console

if TYPE_CHECKING:
    from deme_cli.fetch import Asset


def fetch(assets: Sequence[Asset]) -> None:
    """See to it that every asset is on this machine.

    Raises MissingError within two seconds where one is neither here nor within reach.
    """
    from deme_cli.fetch import download, require_assets

    for asset in require_assets(assets):
        with console.progress(f"fetching {asset.name}", 1, "MB") as bar:

            def advance(done: int, total: int, bar: console.Progress = bar) -> None:
                bar.advance(done // 1_000_000, total=-(-total // 1_000_000))

            download(asset, advance)


def fetch_clip(model: str, weights: str) -> None:
    """See to it that the weights of the CLIP score are on this machine, from the hub if need be.

    Raises MissingError within seconds where they are neither here nor within reach.
    """
    from deme_cli.evaluation.clip_weights import download_clip, require_clip

    if tag := require_clip(model, weights):
        console.note(f"fetching {tag.repository} from the hub, for the CLIP score")
        download_clip(tag)
