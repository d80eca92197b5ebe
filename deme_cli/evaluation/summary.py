"""From the scores of every repeat to the figures of the table: means, spreads, differences.

R repeats. Rows of one repeat share their starting noise, so the difference of two rows is taken
within each repeat before it is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from deme_cli.evaluation.measure import Measured


@dataclass(frozen=True)
class Difference:
    """A row minus the first row: mean and sd over the R shared repeats, and the 95 % interval of
    the mean (Student's t with R - 1 degrees of freedom)."""

    to: str
    mean: float
    sd: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """One metric of one row. `sd` is over repeats, None where there is one.

    `details` is what else its document tells, as how many prompts were truncated.
    """

    value: float
    sd: float | None
    n: int
    values: tuple[float, ...]
    difference: Difference | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def document(self) -> dict[str, Any]:
        """As `--json` shows it."""
        shown: dict[str, Any] = {
            "value": self.value,
            "sd": self.sd,
            "n": self.n,
            "repeats": len(self.values),
            "values": list(self.values),
            **self.details,
        }
        if self.difference is not None:
            shown["difference"] = {
                "to": self.difference.to,
                "mean": self.difference.mean,
                "sd": self.difference.sd,
                "interval": list(self.difference.interval),
            }
        return shown


def summarise(measured: Sequence[Measured]) -> dict[str, dict[str, Figure]]:
    """Figures by row and metric, rows in the order in which they were first measured."""
    rows: dict[str, list[Measured]] = {}
    for record in measured:
        rows.setdefault(record.row, []).append(record)
    first = next(iter(rows.values()))
    return {
        name: {
            metric: _figure(metric, records, first if records is not first else [])
            for metric in records[0].values
        }
        for name, records in rows.items()
    }


def _figure(metric: str, records: Sequence[Measured], first: Sequence[Measured]) -> Figure:
    values = np.array([record.values[metric] for record in records])
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return Figure(
        value=float(values.mean()),
        sd=sd,
        n=records[0].n,
        values=tuple(values.tolist()),
        difference=_difference(metric, records, first),
        details=_details(metric, records),
    )


def _details(metric: str, records: Sequence[Measured]) -> dict[str, Any]:
    """Those of the first repeat; a standard error is that of the mean over all repeats."""
    found = [record.details.get(metric, {}) for record in records]
    errors = [details["standard_error"] for details in found if "standard_error" in details]
    if not errors:
        return found[0]
    return {**found[0], "standard_error": float(np.linalg.norm(errors)) / len(errors)}


def _difference(
    metric: str, records: Sequence[Measured], first: Sequence[Measured]
) -> Difference | None:
    """The paired difference over the repeats that both rows have; None for fewer than two."""
    others = {record.repeat: record.values[metric] for record in first}
    pairs = [r.values[metric] - others[r.repeat] for r in records if r.repeat in others]
    if len(pairs) < 2:
        return None
    sd = float(np.std(pairs, ddof=1))
    return Difference(first[0].row, float(np.mean(pairs)), sd, interval_of(pairs))


def interval_of(sample: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two numbers or more (Student's t)."""
    from scipy.special import stdtrit

    count, mean = len(sample), float(np.mean(sample))
    half = float(stdtrit(count - 1, 0.975)) * float(np.std(sample, ddof=1)) / count**0.5
    return mean - half, mean + half
