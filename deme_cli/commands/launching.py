"""What commands that work in several processes of one launch do first: meet, and let one speak."""

from __future__ import annotations

import os

from deme_cli import console
from deme_cli.launch import read_launch
from deme_cli.processes import World, join


def meet(device: str) -> World:
    """Join the other processes of this launch, if there are any; the first speaks for all.

    Raises what `read_launch` and `join` raise.
    """
    launch = read_launch(os.environ)
    if launch.rank > 0:
        console.mute()
    elif launch.world_size > 1:
        console.note(f"{launch.world_size} processes work together; waiting for all to come")
    return join(launch, device)
