"""A ladder of objectives: a cheap one judges every candidate, each next one the best of the last.

`loss:64,kid@1k:16,fid@5k` reads: by held-out loss keep 64, by the kernel distance of 1,000 images
keep 16 of them, and let the Fréchet distance of 5,000 images decide. Without a comma it is one
objective. What the last rung keeps is recorded, and changes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from deme_cli.errors import ConfigError

SHOWN = 10  # candidates that the last rung shows if nobody says otherwise
OBJECTIVES = ("loss", "experts", "kid", "fid")
_RUNG = re.compile(r"(?P<name>[a-z]+)(?:@(?P<num>[0-9.]+k?))?(?::(?P<keep>\d+))?")


@dataclass(frozen=True)
class Rung:
    """One objective: its name, draws or images per candidate, and how many candidates it keeps."""

    name: str
    num: int
    keep: int

    @property
    def is_distance(self) -> bool:
        return self.name in ("kid", "fid")


def parse_ladder(text: str, *, num: int) -> list[Rung]:
    """The rungs of `--objective`; `num` where one names no number of its own.

    Raises ConfigError where the text does not parse, a rung that is not the last keeps no number,
    or one keeps more than the one before.
    """
    rungs: list[Rung] = []
    parts = [part.strip() for part in text.split(",")]
    for place, part in enumerate(parts):
        match = _RUNG.fullmatch(part)
        if not match or match["name"] not in OBJECTIVES:
            raise ConfigError(
                f"objective {part!r}: expected {', '.join(OBJECTIVES)}, or several in turn, as "
                f"loss:64,kid@1k:16,fid@5k"
            )
        is_last = place == len(parts) - 1
        if match["keep"] is None and not is_last:
            raise ConfigError(
                f"objective {part!r}: how many does it keep for the next? as {part}:16"
            )
        keep = int(match["keep"] or SHOWN)
        if keep < 1 or (match["keep"] and rungs and keep > rungs[-1].keep):
            least = f"at most the {rungs[-1].keep} it is given" if rungs else "at least 1"
            raise ConfigError(f"objective {part!r} keeps {keep}; expected {least}")
        rungs.append(Rung(match["name"], _number(match["num"], part) or num, keep))
    return rungs


def _number(text: str | None, part: str) -> int | None:
    """`500`, `1k` or `2.5k` as a whole number."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("k")) * (1000 if text.endswith("k") else 1)
    except ValueError:
        value = 0.0
    if value < 1 or value != int(value):
        raise ConfigError(
            f"objective {part!r}: {text} is no number of draws or images, as 500 or 2k"
        )
    return int(value)
