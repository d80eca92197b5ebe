"""From one rung of a ladder to the next: who goes on, and whether both rungs agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deme_cli.merging.search.trials import (
    BASE_NAME,
    BY_RANGE,
    MEAN_NAME,
    Asked,
    Trial,
    ranked,
)

WEAK_RHO = 0.5
ENOUGH = 8  # candidates from which a rank correlation is more than chance


def shortlist(trials: Sequence[Trial], keep: int) -> list[Trial]:
    """The best `keep` of a rung that are finite, from the best on; base and mean always pass."""
    finite = [trial for trial in ranked(trials) if math.isfinite(trial.objective)]
    kept = [trial for trial in finite if trial.name not in (BASE_NAME, MEAN_NAME)][:keep]
    return [trial for trial in finite if trial in kept or trial.name in (BASE_NAME, MEAN_NAME)]


def rank_correlations_by_range(
    lower: Sequence[Asked], upper: Sequence[Trial], num_ranges: int
) -> list[float | None]:
    """Spearman's rho of the loss on each range alone with the next rung."""
    kept = [one for one in lower if len(one.extra.get(BY_RANGE, ())) == num_ranges]
    alone = [
        [
            Trial(one.number, one.point, math.inf if v is None else v, math.inf)
            for one in kept
            for v in [one.extra[BY_RANGE][index]]
        ]
        for index in range(num_ranges)
    ]
    return [rank_correlation(trials, upper) for trials in alone]


def rank_correlation(lower: Sequence[Trial], upper: Sequence[Trial]) -> float | None:
    """Spearman's rho of two rungs over the candidates that both have judged; None for fewer than 3
    or where one gives all the same."""
    from scipy.stats import spearmanr

    first = {t.point: t.objective for t in lower if math.isfinite(t.objective)}
    pairs = [(first[t.point], t.objective) for t in upper
             if t.point in first and math.isfinite(t.objective)]  # fmt: skip
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)
