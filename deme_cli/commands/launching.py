"""What a command does first in a launch of several processes: meet, or leave all to the first."""

from __future__ import annotations

import os

import typer

from deme_cli import console
from deme_cli.distributed import World, join, read_launch


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


def only_first() -> None:
    """Go on in the first process of this launch, which is alone from here on; end the others.

    They end well and without a word. Raises what `read_launch` raises, and typer.Exit.
    """
    launch = read_launch(os.environ)
    if launch.rank > 0:
        raise typer.Exit
    if launch.world_size > 1:
        os.environ["WORLD_SIZE"] = "1"  # nor does a command that this one runs look for the others
