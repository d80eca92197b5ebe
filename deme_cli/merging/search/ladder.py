"""From one rung of a ladder to the next: who goes on, and whether both rungs agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from deme_cli.merging.search.space import Point
from deme_cli.merging.search.trials import (
    BASE_NAME,
    BY_RANGE,
    MEAN_NAME,
    Asked,
    Trial,
    ranked,
)
from deme_cli.timesteps import TimestepRange

WEAK_RHO = 0.5
ENOUGH = 8  # candidates from which a rank correlation is more than chance


def shortlist(trials: Sequence[Trial], keep: int) -> list[Trial]:
    """The best `keep` of a rung that are finite, from the best on; base and mean always pass."""
    finite = [trial for trial in ranked(trials) if math.isfinite(trial.objective)]
    kept = [trial for trial in finite if trial.name not in (BASE_NAME, MEAN_NAME)][:keep]
    return [trial for trial in finite if trial in kept or trial.name in (BASE_NAME, MEAN_NAME)]


def rank_correlation(lower: Sequence[Trial], upper: Sequence[Trial]) -> float | None:
    """Spearman's rho of two rungs over the candidates that both have judged; None for fewer than 3
    or where one gives all the same."""
    return _spearman({trial.point: trial.objective for trial in lower}, upper)


def rank_correlations_by_range(
    lower: Sequence[Asked], upper: Sequence[Trial], ranges: Sequence[TimestepRange]
) -> dict[str, float]:
    """Spearman's rho of the loss on each range alone with the next rung, where there is one."""
    by_range = {one.point: one.extra[BY_RANGE] for one in lower if BY_RANGE in one.extra}
    found = {}
    for index, span in enumerate(ranges):
        rho = _spearman({point: losses[index] for point, losses in by_range.items()}, upper)
        if rho is not None:
            found[str(span)] = rho
    return found


def _spearman(lower: Mapping[Point, float | None], upper: Sequence[Trial]) -> float | None:
    """Over the points with a finite value in both."""
    from scipy.stats import spearmanr

    pairs = []
    for trial in upper:
        value = lower.get(trial.point)
        if value is not None and math.isfinite(value) and math.isfinite(trial.objective):
            pairs.append((value, trial.objective))
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)
