"""Measuring rows: every image of every row and repeat is drawn, looked at, and forgotten.

The seed moves every row together far more than rows differ, so in one repeat all rows start from
the same noise, and rows are compared by paired differences to the first.

Several processes share the batches: each draws its own and looks at them on its own device, and the
first one takes in what all have seen, in the order of the images. So the figures are those of one
process, bit for bit where the devices are alike. What is measured is kept in a small JSON file
until all is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.distributed import ALONE, World
from deme_cli.errors import NumericsError
from deme_cli.evaluation.frechet import RunningStatistics, frechet_distance
from deme_cli.evaluation.kid import kernel_distance
from deme_cli.evaluation.references import Reference
from deme_cli.evaluation.rows import Row
from deme_cli.files import write_whole
from deme_cli.sampling.compiled import UNCOMPILED, CompiledSteps
from deme_cli.sampling.sampler import ImageBatch, sample_images
from deme_cli.sampling.shares import DrawingStops, Shares

if TYPE_CHECKING:
    from deme_cli.evaluation.clip_score import ClipScorer
    from deme_cli.evaluation.features import Extractor


@dataclass(frozen=True)
class Metrics:
    """All that measures images, loaded: features and what they are compared with, and CLIP.

    references: opened, by the names of their metrics.
    """

    extractor: Extractor | None = None
    references: Mapping[str, Reference] = field(default_factory=dict)
    clip: ClipScorer | None = None

    @property
    def card(self) -> dict[str, Any]:
        """Their part of every row's card; features have none where no distance is measured."""
        told: dict[str, Any] = {}
        if self.extractor is not None:
            weights = self.extractor.weights
            told["features"] = weights.name
            told["weights_sha256"] = weights.sha256
            told["weights_published"] = weights.published
            told["resize"] = weights.resize
            told["references"] = {name: one.card for name, one in self.references.items()}
        if self.clip is not None:
            told["clip_score"] = self.clip.weights.card
        return told


@dataclass(frozen=True, slots=True)
class MeasureProgress:
    """`done` of the `total` images of this row and repeat are drawn and looked at.

    Of images of other processes, those are counted that have been taken in.
    """

    row: str
    repeat: int
    done: int
    total: int


@dataclass(frozen=True)
class Measured:
    """The scores of one row in one repeat, by metric, on n images; `details` likewise."""

    row: str
    repeat: int
    n: int
    values: dict[str, float]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """All n images, as in MeasureProgress."""
        return self.n


class Unfinished:
    """What an unfinished run has measured, so that the same command goes on where it stopped.

    `identity` is JSON: all cards, counts and seeds of the run. Where the folder takes no files
    nothing is kept, and a stopped run begins anew.
    """

    def __init__(self, folder: Path, identity: Any) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.path = folder / f".deme-eval-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
        self._writable = os.access(folder, os.W_OK)
        try:
            self._records = [Measured(**entry) for entry in json.loads(self.path.read_text())]
        except (OSError, ValueError, TypeError):
            self._records = []  # absent, or written by a run that was killed: measure again

    def find(self, row: str, repeat: int) -> Measured | None:
        """What was measured of a row in a repeat, if it was."""
        return next((r for r in self._records if (r.row, r.repeat) == (row, repeat)), None)

    def keep(self, record: Measured) -> None:
        self._records.append(record)
        if self._writable:
            text = json.dumps([asdict(record) for record in self._records])
            write_whole(self.path, [text.encode()])

    def close(self) -> None:
        """The run is finished: nothing needs to be kept."""
        self.path.unlink(missing_ok=True)


def seeds_of(row: Row, config: EvalConfig) -> list[int]:
    """The seed of every repeat; none for finished images, which are measured once."""
    return [] if row.finished is not None else [config.seed + r for r in range(config.repeats)]


def num_images(row: Row, config: EvalConfig) -> int:
    """Images of one repeat: as many as asked, or as there are."""
    assert config.num is not None, "known once the prompts are"
    return config.num if row.finished is None else min(config.num, len(row.finished))


def total_images(rows: Sequence[Row], config: EvalConfig) -> int:
    """Images of all rows in all repeats."""
    return sum(max(len(seeds_of(row, config)), 1) * num_images(row, config) for row in rows)


def measure_rows(
    rows: Sequence[Row],
    metrics: Metrics,
    *,
    sample: SampleConfig,
    config: EvalConfig,
    unfinished: Unfinished | None = None,
    compile: str = "off",
    world: World = ALONE,
) -> Iterator[MeasureProgress | Measured]:
    """Measure every row in every repeat; in one repeat all rows start from the same noise.

    Yields progress and, on the first process, one Measured per row and repeat, first those that an
    earlier run has left unfinished, which only the first process has. compile: as
    `compile_network` takes it. SIGINT, SIGTERM and SIGUSR1 end it with Stopped; what is measured
    stays. Raises Lost where another process has ended.
    """
    compiled, num_kept = _compiled(compile, rows, sample, config, world), 0
    stop = DrawingStops(world)

    def message() -> str:
        return f"stopped; {num_kept} measurements are kept, run the same command again to go on"

    with stop:
        for repeat in range(config.repeats):
            for row in rows:
                if repeat and row.finished is not None:
                    continue
                known = unfinished.find(row.name, repeat) if unfinished is not None else None
                if world.largest(int(known is not None)):
                    num_kept += 1
                    if known is not None:
                        yield known
                    continue
                for record in measure_row(
                    row, repeat, metrics, sample=sample, config=config, world=world,
                    compiled=compiled,
                ):  # fmt: skip
                    if isinstance(record, Measured):
                        if unfinished is not None:
                            unfinished.keep(record)
                        num_kept += 1
                    yield record
                    stop.go_on(message())
                world.wait()  # until the first one has kept it
                num_kept += not world.is_first
                stop.go_on(message())
    if unfinished is not None:
        unfinished.close()


def measure_row(
    row: Row,
    repeat: int,
    metrics: Metrics,
    *,
    sample: SampleConfig,
    config: EvalConfig,
    world: World = ALONE,
    compiled: CompiledSteps = UNCOMPILED,
) -> Iterator[MeasureProgress | Measured]:
    """Draw the images of a repeat (its seed is config.seed + repeat) and take their scores.

    Yields progress, then, on the first process, the one Measured. Raises NumericsError on images,
    features or scores that are not finite, Lost where another process has ended.
    """
    n, seed = num_images(row, config), config.seed + repeat
    shares = Shares(n, sample.batch_size, world=world)
    running, kept, pairs = RunningStatistics(), [], []
    keeps = any(reference.features is not None for reference in metrics.references.values())
    num_rounds = 0
    for seen in shares.rounds(_images_of(row, replace(sample, num=n, seed=seed), shares, compiled)):
        if isinstance(seen, int):
            yield MeasureProgress(row.name, repeat, seen + shares.num_of_others(num_rounds), n)
            continue
        num_rounds += 1
        if metrics.extractor is not None:
            own = metrics.extractor.features(seen.images) if seen else None
            for features in shares.gather(own):
                running.add(features)
                if keeps:
                    kept.append(features.astype(np.float32))
        if metrics.clip is not None:
            assert row.prompts is not None
            own = None
            if seen:
                prompts = row.prompts[seen.start : seen.start + len(seen.images)]
                own = metrics.clip.compare(seen.images, prompts)
            pairs += shares.gather(own)
    if not world.is_first:
        return
    values, details = {}, {}
    if metrics.extractor is not None:
        values = distances(metrics.references, running, kept, seed=seed)
    if metrics.clip is not None:
        cosines, is_cut = np.concatenate(pairs).T
        values["clip_score"] = 100 * float(cosines.mean())
        details["clip_score"] = {"truncated": int(is_cut.sum()), **metrics.clip.weights.card}
    for metric, value in values.items():
        if not np.isfinite(value):
            raise NumericsError(f"{row.name}: {metric} is not finite ({value})")
    yield Measured(row.name, repeat, n, values, details)


def distances(
    references: Mapping[str, Reference],
    running: RunningStatistics,
    features: Sequence[np.ndarray],
    *,
    seed: int,
) -> dict[str, float]:
    """The distance of images to each opened reference, by metric.

    running, features: of the images, these in batches (B, d), for kernel distances alone.
    seed: of the random subsets of a kernel distance.
    """
    found = running.statistics()
    values = {}
    for metric, reference in references.items():
        if (other := reference.statistics) is not None:
            values[metric] = frechet_distance(found.mu, found.sigma, other.mu, other.sigma)
        else:
            assert reference.features is not None
            values[metric] = kernel_distance(
                np.concatenate(features), reference.features, seed=seed
            )
    return values


def _images_of(
    row: Row, sample: SampleConfig, shares: Shares, compiled: CompiledSteps
) -> Iterator[ImageBatch | int]:
    """The images of a row that this process sees, and between, how many of them are done."""
    if row.finished is not None:
        done = 0
        for span in shares.own:
            yield ImageBatch(span.start, row.finished.batch(span).permute(0, 2, 3, 1).numpy())
            done += len(span)
            yield done
        return
    for record in sample_images(
        row.experts, sample, conditioning=row.conditioning, world=shares.world, compiled=compiled
    ):
        if isinstance(record, ImageBatch):
            yield record
        else:
            yield record.done * shares.num // record.total


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
                **asdict(self.difference), "interval": list(self.difference.interval)
            }  # fmt: skip
        return shown


def summarise(measured: Sequence[Measured]) -> dict[str, dict[str, Figure]]:
    """Figures by row and metric, rows in the order in which they were first measured.

    Rows of one repeat share their starting noise, so the difference of two rows is taken within
    each repeat before it is averaged. Details are those of the first repeat.
    """
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
    values = [record.values[metric] for record in records]
    return Figure(
        value=float(np.mean(values)),
        sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        n=records[0].n,
        values=tuple(values),
        difference=_difference(metric, records, first),
        details=records[0].details.get(metric, {}),
    )


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
