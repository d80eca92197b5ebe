"""A search of the coefficients (paper, section 3.3): every point of a grid, the best one wins.

The best is the least objective; among equals, the shortest vector of coefficients, which is the
least change to the base. Every trial is logged before it is yielded, so a search can go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deme_cli.config import MergeConfig
from deme_cli.merging.candidates import CandidateNetwork
from deme_cli.merging.grid import Grid, Point
from deme_cli.merging.lineage import Family
from deme_cli.merging.objectives import Check, Objective
from deme_cli.merging.trials import Trial, TrialLog, ranked


@dataclass(frozen=True)
class Search:
    """What is searched: a family's coefficients, over `points`, by an objective."""

    family: Family
    grid: Grid
    points: Sequence[Point]
    objective: Objective
    config: MergeConfig
    dtype: str

    def describe(self) -> dict[str, Any]:
        """Everything the trials depend on."""
        return {
            "method": "grid",
            "base": self.family.base_record.fingerprint,
            "parents": [parent.record.fingerprint for parent in self.family.parents],
            "grid": [list(values) for values in self.grid],
            "objective": self.objective.protocol,
            "dtype": self.dtype,
        }

    def trials(self, log: TrialLog, check: Check, *, device: str) -> Iterator[Trial]:
        """Run the trials that the log has not; the network is loaded when the first one comes."""
        network: CandidateNetwork | None = None

        def evaluate(point: Point) -> float:
            nonlocal network
            if network is None:
                network = CandidateNetwork(self.family, device=device, dtype=self.dtype)
            return self.objective(network.at(point), check)

        return evaluate_points(evaluate, self.points, log)

    def record(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """How the coefficients were found, as the merged file tells; None stands for infinity."""
        values = {
            "base": trials[0].objective,
            "mean": trials[1].objective,
            "best": ranked(trials)[0].objective,
        }
        return {
            "method": "grid",
            "objective": self.objective.protocol["name"],
            "grid": [list(values) for values in self.grid],
            "evaluations": len(trials),
            "seed": self.config.seed,
            "num": self.config.num,
            "best": values["best"],
            "values": {name: v if math.isfinite(v) else None for name, v in values.items()},
            "protocol": {**self.objective.protocol, "dtype": self.dtype},
        }


def evaluate_points(
    evaluate: Callable[[Point], float], points: Sequence[Point], log: TrialLog
) -> Iterator[Trial]:
    """Evaluate `points` in order, those of `log` first, each logged before it is yielded.

    An objective that is not finite counts as infinite.
    """
    best = math.inf
    for index, point in enumerate(points):
        if index >= len(log.values):
            value = evaluate(point)
            log.add(point, value if math.isfinite(value) else math.inf)
        best = min(best, log.values[index])
        yield Trial(index, point, log.values[index], best)
