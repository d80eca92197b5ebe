"""The procedure of `deme eval`: every row in every repeat, keeping what is finished.

Several processes share the images of each; the first one keeps the figures. Nothing is printed
here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.distributed import ALONE, World
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
from deme_cli.sampling.compiled import CompiledSteps
from deme_cli.sampling.shares import DrawingStops


def total_images(rows: Sequence[Row], config: EvalConfig) -> int:
    """Images of all rows in all repeats."""
    return sum(repeats_of(row, config) * num_images(row, config) for row in rows)


def evaluate_rows(
    rows: Sequence[Row],
    instruments: Instruments,
    *,
    sample: SampleConfig,
    config: EvalConfig,
    ledger: Ledger | None,
    compile: str = "off",
    world: World = ALONE,
) -> Iterator[MeasureProgress | Measured]:
    """Measure every row in every repeat; in one repeat all rows start from the same noise.

    Yields progress and, on the first process, one Measured per row and repeat, first those that an
    earlier run has left in the ledger, which only the first process has. compile: as
    `compile_network` takes it. SIGINT, SIGTERM and SIGUSR1 end it with Stopped; what is measured
    stays. Raises Lost where another process has ended.
    """
    compiled, num_kept = _compiled(compile, rows, sample, config, world), 0
    stop = DrawingStops(world)
    with stop:
        for repeat in range(config.repeats):
            for row in rows:
                if repeat >= repeats_of(row, config):
                    continue
                known = ledger.find(row.name, repeat) if ledger is not None else None
                if world.largest(int(known is not None)):
                    num_kept += 1
                    if known is not None:
                        yield known
                    continue
                for record in measure_row(
                    row, repeat, instruments, sample=sample, config=config, world=world,
                    compiled=compiled,
                ):  # fmt: skip
                    if isinstance(record, Measured):
                        if ledger is not None:
                            ledger.keep(record)
                        num_kept += 1
                    yield record
                    stop.go_on(_stopped(num_kept))
                world.wait()  # until the first one has kept it
                num_kept += not world.is_first
                stop.go_on(_stopped(num_kept))
    if ledger is not None:
        ledger.close()


def _stopped(num_kept: int) -> str:
    return f"stopped; {num_kept} measurements are kept, run the same command again to go on"


def _compiled(
    how: str, rows: Sequence[Row], sample: SampleConfig, config: EvalConfig, world: World
) -> CompiledSteps:
    """What the forwards of all rows go through."""
    models = [row for row in rows if row.finished is None]
    most = max((num_images(row, config) for row in models), default=0)
    num_batches = math.ceil(most / sample.batch_size / world.size)
    return CompiledSteps(
        how,
        num_forwards=len(models) * config.repeats * num_batches * sample.steps,
        num_loads=config.repeats * sum(len(row.experts) for row in models),
    )
