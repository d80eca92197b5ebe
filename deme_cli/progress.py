"""How far a verb is, as records for whoever watches; the verb itself shows nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """How far a verb is: `done` of `total` units of what is called `label`; or a note.

    detail: what else is known of it, as the loss of this update.
    """

    done: int = 0
    total: int = 0
    label: str = ""
    unit: str = ""
    note: str = ""
    detail: str = ""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Progress that nobody watches."""
