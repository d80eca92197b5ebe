"""`deme analyze`: the paper's figures for any model, each with the numbers behind it.

Each analysis is a subcommand in a file of its own: a JSON file, and a picture of it beside.
"""

from __future__ import annotations


def analyze() -> None:
    """Draw why it works: where timesteps conflict, what experts changed, where losses fell.

    In a launch of several processes landscape shares its points; the others,
    which take seconds, run in the first process alone.

    Example: deme analyze losses
    """
