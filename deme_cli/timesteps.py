"""Ranges of timesteps: how [0, T) is divided among experts, and which expert owns a timestep.

T timesteps are numbered 0 (clean) to T-1 (noise). Range i of N, counted from 1, is
[(i-1)T/N, iT/N) (paper, section 3.2); its integers are those with floor(t N / T) = i-1, so N need
not divide T. Ranges are half-open and written `start:stop`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from deme_cli.errors import ArtifactError, ConfigError

_SPAN = re.compile(r"(-?\d+):(-?\d+)")


@dataclass(frozen=True, order=True, slots=True)
class TimestepRange:
    """The timesteps t with start <= t < stop."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ConfigError(f"timestep range {self} is empty or negative; need 0 <= start < stop")

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, t: float) -> bool:
        return self.start <= t < self.stop


@dataclass(frozen=True, slots=True)
class RangeChoice:
    """A range as the user named it: `index` of `of` where it came as i/N, else a free span."""

    range: TimestepRange
    index: int | None = None
    of: int | None = None

    @property
    def label(self) -> str:
        """The name used in file names: `2of4`, or `250-500` for a free span."""
        return f"{self.index}of{self.of}" if self.of else f"{self.range.start}-{self.range.stop}"


def split_uniform(num_ranges: int, num_train_timesteps: int) -> list[TimestepRange]:
    """N adjacent ranges that cover [0, T) once, the i-th holding t with floor(t N / T) = i-1."""
    if not 1 <= num_ranges <= num_train_timesteps:
        raise ConfigError(
            f"cannot divide {num_train_timesteps} timesteps into {num_ranges} ranges; "
            f"-n takes 1 to {num_train_timesteps}"
        )
    edges = [-(-i * num_train_timesteps // num_ranges) for i in range(num_ranges + 1)]  # ceil
    return [TimestepRange(a, b) for a, b in pairwise(edges)]


def parse_range(
    text: str, num_train_timesteps: int, ranges: Sequence[TimestepRange] = ()
) -> RangeChoice:
    """The range that `i/N` or `start:stop` names, within [0, T).

    `i/N` is taken from `ranges` where there are N of them (a split that need not be uniform),
    else it is the i-th of N equal parts. Raises ConfigError on anything else.
    """
    index = of = None
    if match := re.fullmatch(r"(-?\d+)/(-?\d+)", text.strip()):
        index, of = int(match[1]), int(match[2])
        if not 1 <= index <= of:
            raise ConfigError(f"--range {text}: i/N needs 1 <= i <= N, as in 2/4")
        parts = ranges if len(ranges) == of else split_uniform(of, num_train_timesteps)
        start, stop = parts[index - 1].start, parts[index - 1].stop
    elif match := _SPAN.fullmatch(text.strip()):
        start, stop = int(match[1]), int(match[2])
    else:
        raise ConfigError(
            f"--range {text}: expected i/N as in 2/4, start:stop as in 250:500, or all"
        )
    if not 0 <= start < stop <= num_train_timesteps:
        raise ConfigError(
            f"--range {text}: {start}:{stop} needs 0 <= start < stop <= {num_train_timesteps}, the "
            f"timesteps of this model"
        )
    return RangeChoice(TimestepRange(start, stop), index, of)


def parse_span(text: str, what: str) -> TimestepRange:
    """`start:stop` as a range. Raises ConfigError naming `what`."""
    if match := _SPAN.fullmatch(text.strip()):
        return TimestepRange(int(match[1]), int(match[2]))
    raise ConfigError(f"{what} {text!r}: expected start:stop, as in 250:500")


def require_cover(ranges: Sequence[TimestepRange], num_train_timesteps: int) -> None:
    """Check that the ranges cover [0, T) exactly once.

    Raises ArtifactError naming the first gap or overlap.
    """
    position = 0
    for span in sorted(ranges):
        if span.start > position:
            raise ArtifactError(
                f"no expert covers timesteps {position}:{span.start}; "
                f"train one with `deme finetune --range {position}:{span.start}`"
            )
        if span.start < position:
            raise ArtifactError(
                f"two experts cover timesteps {span.start}:{min(position, span.stop)}; "
                f"an ensemble needs ranges without overlap"
            )
        position = span.stop
    if position != num_train_timesteps:
        raise ArtifactError(
            f"no expert covers timesteps {position}:{num_train_timesteps}; train one with "
            f"`deme finetune --range {position}:{num_train_timesteps}`"
            if position < num_train_timesteps
            else f"ranges reach {position}, past the model's {num_train_timesteps} timesteps"
        )


def route(t: float, ranges: Sequence[TimestepRange]) -> int:
    """Index of the range that holds t: by the timestep, never by the place in a step list (Eq. 7).

    Samplers with fractional timesteps (Euler, Heun) fall into the range of floor(t).
    Timesteps outside every range go to the nearest end (a sampler may start at T).
    """
    t = int(t)
    for index, span in enumerate(ranges):
        if t in span:
            return index
    distance = [min(abs(t - span.start), abs(t - span.stop + 1)) for span in ranges]
    return distance.index(min(distance))
