"""The procedure of `deme eval`: every row in every repeat, keeping what is finished.

Nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.evaluation.ledger import Ledger
from deme_cli.evaluation.measure import (
    Measured,
    MeasureProgress,
    measure_row,
    num_images,
    repeats_of,
)
from deme_cli.evaluation.meters import Instruments
from deme_cli.evaluation.rows import Row
from deme_cli.interrupts import StopRequests


def total_images(rows: Sequence[Row], config: EvalConfig) -> int:
    """Images of all rows in all repeats."""
    return sum(repeats_of(row, config) * num_images(row, config) for row in rows)


def evaluate_rows(
    rows: Sequence[Row],
    instruments: Instruments,
    *,
    sample: SampleConfig,
    config: EvalConfig,
    ledger: Ledger,
) -> Iterator[MeasureProgress | Measured]:
    """Measure every row in every repeat; in one repeat all rows start from the same noise.

    Yields progress and one Measured per row and repeat, first those that an earlier run has left in
    the ledger. SIGINT, SIGTERM and SIGUSR1 end it with Stopped; what is measured stays.
    """
    with StopRequests() as stop:
        for repeat in range(config.repeats):
            for row in rows:
                if repeat >= repeats_of(row, config):
                    continue
                if (known := ledger.find(row.name, repeat)) is not None:
                    yield known
                    continue
                for record in measure_row(row, repeat, instruments, sample=sample, config=config):
                    if isinstance(record, Measured):
                        ledger.keep(record)
                    yield record
                    if stop.asked:
                        raise stop.stopped(
                            f"stopped; {len(ledger)} measurements are kept, run the same command "
                            f"again to go on"
                        )
    ledger.close()
