"""What a row measured, how it differs from the first row, and what may be said of it.

A row is called better or worse only where the 95 % interval of its paired difference lies wholly on
one side of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deme_cli.comparison.results import OVER_EVALUATION, lower_is_better
from deme_cli.console import digits_for, fixed, signed

BETTER, WORSE, EVEN = "better", "worse", "even"


@dataclass(frozen=True)
class Difference:
    """A row minus the row `to`, paired: mean, sd, and the 95 % interval of the mean."""

    to: str
    mean: float
    sd: float
    low: float
    high: float
    over: str = OVER_EVALUATION

    @property
    def is_known(self) -> bool:
        return all(map(math.isfinite, (self.mean, self.low, self.high)))

    def side(self, lower: bool) -> str:
        """BETTER, WORSE, or EVEN where the interval holds 0 or is not finite."""
        if not self.is_known or self.low <= 0 <= self.high:
            return EVEN
        return BETTER if (self.mean < 0) == lower else WORSE

    @property
    def digits(self) -> int:
        """Two figures of the spread, or more where an end of the interval would be written as 0."""
        spread = self.sd if math.isfinite(self.sd) else (self.high - self.low) / 2
        digits = digits_for(spread, self.mean)
        ends = [abs(end) for end in (self.low, self.high) if math.isfinite(end) and end]
        if ends and 0.5 * 10**-digits > min(ends):
            return min(math.ceil(-math.log10(min(ends))), digits + 3)
        return digits

    @property
    def interval(self) -> str:
        return f"[{signed(self.low, self.digits)}, {signed(self.high, self.digits)}]"

    @property
    def text(self) -> str:
        """mean ± sd [interval]"""
        spread = f" ± {fixed(self.sd, self.digits)}" if math.isfinite(self.sd) else ""
        return f"{signed(self.mean, self.digits)}{spread} {self.interval}"


@dataclass(frozen=True)
class Measure:
    """One metric of one row. `sd` is None without repeats; `n` images in each of `repeats`."""

    row: str
    kind: str
    value: float
    sd: float | None
    n: int
    repeats: int
    difference: Difference | None = None

    @property
    def text(self) -> str:
        """value ± sd"""
        digits = digits_for(self.sd, self.value)
        spread = "" if self.sd is None else f" ± {fixed(self.sd, digits)}"
        return f"{fixed(self.value, digits)}{spread}"


def best_of(measures: Sequence[Measure], *, lower: bool) -> Measure | None:
    """The row of the best finite mean, if any."""
    finite = [measure for measure in measures if math.isfinite(measure.value)]
    return min(finite, key=lambda m: m.value if lower else -m.value, default=None)


def verdict(metric: str, measures: Sequence[Measure]) -> str:
    """A sentence on the best row, and on the merged one if that is another, against the first."""
    lower = lower_is_better(metric)
    best, first = best_of(measures, lower=lower), measures[0]
    way = "lower is better" if lower else "higher is better"
    if best is None:
        return f"{metric}: no row has a finite value."
    if len(measures) == 1:
        return f"{metric} ({way}) of {first.row}: {first.text}; no other row to compare it with."
    if best is first:
        return f"{metric} ({way}): no row has a better mean than {first.row}, {first.text}."
    parts = [f"best mean {best.text} of {best.row}, {_against(best, first, lower)}"]
    merged = [m for m in measures if m.kind == "merged" and m is not best and m is not first]
    parts += [f"{m.row} {m.text}, {_against(m, first, lower)}" for m in merged[:2]]
    return f"{metric} ({way}): {'; '.join(parts)}."


def _against(measure: Measure, first: Measure, lower: bool) -> str:
    """How a row stands to the first, in words that its interval allows."""
    difference = measure.difference
    if difference is None or not difference.is_known:
        return (
            f"against {first.text} of {first.row} without an interval, which takes repeats: "
            f"nothing is claimed"
        )
    side = difference.side(lower)
    if side == EVEN:
        return f"not told apart from {difference.to} ({difference.text})"
    return (
        f"{side} than {difference.to} by {fixed(abs(difference.mean), difference.digits)} "
        f"(95 % interval of the difference over {difference.over}: {difference.interval})"
    )
