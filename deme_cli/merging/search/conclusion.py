"""What a finished search comes to: its ranking, how its rungs agree, and the record of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from deme_cli.merging.search.ladder import rank_correlation, rank_correlations_by_range
from deme_cli.merging.search.objectives import Objective
from deme_cli.merging.search.run import Search
from deme_cli.merging.search.trials import (
    BASE_NAME,
    MEAN_NAME,
    Asked,
    Trial,
    ranked,
    seconds_spent,
    trials_of,
)
from deme_cli.timesteps import TimestepRange


@dataclass(frozen=True)
class Conclusion:
    """`ranking` of the last rung, best first; `rhos` of each rung with the next, over `shared`
    candidates, and `rhos_by_range` of the loss on each expert's range alone; `record` as the merged
    file tells of it."""

    ranking: Sequence[Trial]
    rhos: Sequence[float | None]
    shared: Sequence[int]
    rhos_by_range: Sequence[Mapping[str, float]]
    evaluations: int
    broken: int
    record: dict[str, Any]

    @property
    def best(self) -> Trial:
        return self.ranking[0]


def conclude(
    search: Search, asked: Sequence[Asked], objectives: Sequence[Objective],
    ranges: Sequence[TimestepRange] = (),
) -> Conclusion:  # fmt: skip
    """Sum up the trials. Raises NumericsError where the last rung found nothing finite."""
    trials = trials_of(asked)
    by_rung = [[t for t in trials if t.rung == rung] for rung in range(len(search.rungs))]
    pairs = list(pairwise(by_rung))
    rhos = [rank_correlation(lower, upper) for lower, upper in pairs]
    by_range = [
        rank_correlations_by_range([one for one in asked if one.rung == rung], upper, ranges)
        for rung, (_, upper) in enumerate(pairs)
    ]
    ranking = ranked(by_rung[-1])
    named = {trial.name: trial.objective for trial in by_rung[-1] if trial.name}
    values = {
        "base": named.get(BASE_NAME),
        "mean": named.get(MEAN_NAME),
        "best": ranking[0].objective,
    }
    record = {
        "objective": objectives[-1].name,
        "evaluations": len(trials),
        "seconds": round(seconds_spent(asked), 3),
        "best": ranking[0].objective,
        "values": {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()},
        "rungs": [
            {
                "objective": objective.name, "num": rung.num, "evaluations": len(found),
                "keep": rung.keep, "rho_to_next": rho, "rho_to_next_by_range": rhos_by_range,
            }
            for rung, objective, found, rho, rhos_by_range in zip(
                search.rungs, objectives, by_rung, [*rhos, None], [*by_range, {}], strict=True
            )
        ],
    }  # fmt: skip
    broken = sum(not math.isfinite(trial.objective) for trial in trials)
    shared = [len({t.point for t in a} & {t.point for t in b}) for a, b in pairs]
    return Conclusion(ranking, rhos, shared, by_range, len(trials), broken, record)
