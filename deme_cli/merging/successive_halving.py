"""Successive halving: a cheap objective judges every candidate, each next one the best of the last.

`loss:64,kid@1k:16,fid@5k` reads: by held-out loss keep 64, by the kernel distance of 1,000 images
keep 16 of them, and let the Fréchet distance of 5,000 images decide. Without a comma it is one
objective. What the last stage keeps is recorded, and changes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from deme_cli.errors import ConfigError

SHOWN = 10  # candidates that the last stage shows if nobody says otherwise
OBJECTIVES = ("loss", "experts", "kid", "fid")
_STAGE = re.compile(r"(?P<name>[a-z]+)(?:@(?P<num>[0-9.]+k?))?(?::(?P<keep>\d+))?")


@dataclass(frozen=True)
class Stage:
    """One objective: its name, draws or images per candidate, and how many candidates it keeps."""

    name: str
    num: int
    keep: int

    @property
    def is_distance(self) -> bool:
        return self.name in ("kid", "fid")


def parse_stages(text: str, *, num: int) -> list[Stage]:
    """The stages of `--objective`; `num` where one names no number of its own.

    Raises ConfigError where the text does not parse, a stage that is not the last keeps no number,
    or one keeps more than the one before.
    """
    stages: list[Stage] = []
    parts = [part.strip() for part in text.split(",")]
    for place, part in enumerate(parts):
        match = _STAGE.fullmatch(part)
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
        if keep < 1 or (match["keep"] and stages and keep > stages[-1].keep):
            least = f"at most the {stages[-1].keep} it is given" if stages else "at least 1"
            raise ConfigError(f"objective {part!r} keeps {keep}; expected {least}")
        stages.append(Stage(match["name"], _number(match["num"], part) or num, keep))
    return stages


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


def label_of(metric: str) -> str:
    """What a person calls an objective, by its name in records."""
    named = {
        "loss": "held-out loss", "experts": "squared distance to the experts",
        "fid": "FID", "kid": "KID",
    }  # fmt: skip
    kind, _, features = metric.partition("_")
    words = {"frechet": "Fréchet distance", "kernel": "kernel distance"}
    return named.get(metric) or f"{words.get(kind, kind)} on {features}"
