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
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.distributed import joined
from deme_cli.errors import NumericsError
from deme_cli.evaluation.features import Extractor, open_extractor
from deme_cli.evaluation.frechet import RunningStatistics, frechet_distance
from deme_cli.evaluation.kid import kernel_distance
from deme_cli.evaluation.neighbours import neighbour_metrics
from deme_cli.evaluation.references import FeatureWeights, Reference, open_reference
from deme_cli.evaluation.rows import Row
from deme_cli.files import write_whole
from deme_cli.sampling.sampler import (
    CompiledSteps,
    DrawingStops,
    ImageBatch,
    Shares,
    sample_images,
)

if TYPE_CHECKING:
    from deme_cli.evaluation.clip_score import ClipScorer, ClipWeights


@dataclass(frozen=True)
class Metrics:
    """All that measures images, loaded: features and what they are compared with, and CLIP.

    references: opened, by the names of their metrics.   neighbours: k of precision and recall.
    """

    extractor: Extractor | None = None
    references: Mapping[str, Reference] = field(default_factory=dict)
    clip: ClipScorer | None = None
    neighbours: int = EvalConfig.neighbours

    @property
    def card(self) -> dict[str, Any]:
        """Their part of every row's card; features have none where no distance is measured."""
        told: dict[str, Any] = {}
        if self.extractor is not None:
            weights = self.extractor.weights
            told = {
                "features": weights.name, "weights_sha256": weights.sha256,
                "weights_published": weights.published, "resize": weights.resize,
                "references": {name: one.card for name, one in self.references.items()},
            }  # fmt: skip
            if any(name.startswith("prc") for name in self.references):
                told["neighbours"] = self.neighbours
        if self.clip is not None:
            told["clip_score"] = self.clip.weights.card
        return told

    def look(self, row: Row, batch: ImageBatch) -> np.ndarray:
        """What is seen of images of a row: features, and the cosines and cuts of CLIP (B, 2).

        ->  float64 (B, d + 2), less what is not measured
        """
        seen = [] if self.extractor is None else [self.extractor.features(batch.images)]
        if self.clip is not None:
            prompts = (row.prompts or ())[batch.start : batch.start + len(batch.images)]
            seen.append(self.clip.compare(batch.images, prompts))
        return np.hstack(seen)


def open_metrics(
    features: FeatureWeights | None, references: Mapping[str, Reference], clip: ClipWeights | None,
    shape: tuple[int, int, int], config: EvalConfig, device: str, progress: Progress,
) -> Metrics:  # fmt: skip
    """Load what measures, and look at the reference images. shape: (C, H, W) of the rows."""
    extractor = scorer = None
    opened = {}
    if features is not None:
        extractor = open_extractor(features, device=device, batch_size=config.batch_size)
        for metric, reference in references.items():
            opened[metric] = open_reference(
                reference, extractor, shape, needs_images=metric != features.name_of("fid"),
                world=joined(), progress=progress,
            )  # fmt: skip
    if clip is not None:
        from deme_cli.evaluation.clip_score import open_clip_scorer

        scorer = open_clip_scorer(clip, device=device, batch_size=config.batch_size)
    return Metrics(extractor, opened, scorer, config.neighbours)


@dataclass(frozen=True)
class Measured:
    """The scores of one row in one repeat, by metric, on n images; `details` likewise."""

    row: str
    repeat: int
    n: int
    values: dict[str, float]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)


def measure_rows(
    rows: Sequence[Row], metrics: Metrics, cards: Mapping[str, Mapping[str, Any]],
    config: EvalConfig, sampling: SampleConfig, *, compile: str = "off",
    progress: Progress = silent,
) -> list[Measured]:  # fmt: skip
    """The scores of every row in every repeat; the first process has them all.

    In one repeat all rows start from the same noise. What an earlier, stopped run under the same
    `cards` has left in the current folder is not measured again; where the folder takes no files
    nothing is kept. SIGINT, SIGTERM and SIGUSR1 end it with Stopped; what is measured stays. Raises
    NumericsError on images, features or scores that are not finite, Lost where another process has
    ended.
    """
    world = joined()
    text = json.dumps([config.num, config.repeats, cards], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    world.require_same({"protocol": digest})
    path = Path(f".deme-eval-{digest}.json")
    known: dict[tuple[str, int], Measured] = {}
    if world.is_first:
        with suppress(OSError, ValueError, TypeError):  # absent, or of a run that was killed
            records = [Measured(**entry) for entry in json.loads(path.read_text())]
            known = {(record.row, record.repeat): record for record in records}
    repeats = range(config.repeats)
    turns = [(row, r) for r in repeats for row in rows if not r or row.finished is None]
    drawn = [row.num_images(config) for row, _ in turns if row.finished is None]
    num_batches = -(-max(drawn, default=0) // (sampling.batch_size * world.size))
    compiled = CompiledSteps(
        compile, num_forwards=len(drawn) * num_batches * sampling.steps,
        num_loads=sum(len(row.experts) for row, _ in turns),
    )  # fmt: skip
    before, total = 0, sum(row.num_images(config) for row, _ in turns)
    with DrawingStops(world) as stop:
        for num_kept, (row, repeat) in enumerate(turns):
            if not world.largest(int((row.name, repeat) in known)):
                for record in _measure_row(row, repeat, metrics, config, sampling, compiled):
                    if is_done := isinstance(record, Measured):
                        known[row.name, repeat] = record
                        if os.access(".", os.W_OK):
                            document = json.dumps([asdict(one) for one in known.values()])
                            write_whole(path, [document.encode()])
                    else:
                        detail = f"{row.name}, repeat {repeat + 1}"
                        progress(Step(before + record, total, "measuring", "image", detail=detail))
                    kept = f"{num_kept + is_done} measurements are kept"
                    stop.go_on(f"stopped; {kept}, run the same command again to go on")
                world.wait()  # until the first one has kept it
            before += row.num_images(config)
    if world.is_first:
        path.unlink(missing_ok=True)
    return [known[row.name, repeat] for row, repeat in turns] if world.is_first else []


def _measure_row(
    row: Row, repeat: int, metrics: Metrics, config: EvalConfig, sampling: SampleConfig,
    compiled: CompiledSteps,
) -> Iterator[int | Measured]:  # fmt: skip
    """Draw the images of a repeat (its seed is config.seed + repeat) and take their scores.

    Yields images done, then, on the first process, the one Measured.
    """
    n, seed, world = row.num_images(config), config.seed + repeat, joined()
    shares = Shares(n, sampling.batch_size, world=world)
    records: Iterable[int | ImageBatch]
    if (finished := row.finished) is None:
        records = sample_images(
            row.experts, replace(sampling, num=n, seed=seed), conditioning=row.conditioning,
            world=world, compiled=compiled,
        )  # fmt: skip
    else:
        records = (
            ImageBatch(span.start, finished.batch(span).permute(0, 2, 3, 1).numpy())
            for span in shares.own
        )

    running, kept, pairs = RunningStatistics(), [], []
    needs_images = any(one.features is not None for one in metrics.references.values())
    for done, _, parts in shares.gather(records, partial(metrics.look, row)):
        for part in parts:
            features, pair = np.split(part, [part.shape[1] - 2 * bool(metrics.clip)], axis=1)
            running.add(features)
            pairs.append(pair)
            if needs_images:
                kept.append(features.astype(np.float32))
        yield done
    if not world.is_first:
        return
    values, details = {}, {}
    for metric, reference in metrics.references.items():
        if (other := reference.statistics) is not None:
            own = running.statistics(row.name)
            values[metric] = frechet_distance(own.mu, own.sigma, other.mu, other.sigma)
            continue
        made, real = np.concatenate(kept), reference.features
        assert real is not None, "opened with one or the other"
        if metric.startswith("prc"):
            for name, value in neighbour_metrics(made, real, metrics.neighbours).items():
                values[name + metric.removeprefix("prc")] = value
        else:
            values[metric] = kernel_distance(made, real, seed=seed)
    if metrics.clip is not None:
        cosines, is_cut = np.concatenate(pairs).T
        values["clip_score"] = 100 * float(cosines.mean())
        details["clip_score"] = {"truncated": int(is_cut.sum()), **metrics.clip.weights.card}
    for metric, value in values.items():
        if not np.isfinite(value):
            raise NumericsError(f"{row.name}: {metric} is not finite ({value})")
    yield Measured(row.name, repeat, n, values, details)


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
            "value": self.value, "sd": self.sd, "n": self.n, "repeats": len(self.values),
            "values": list(self.values), **self.details,
        }  # fmt: skip
        if self.difference is not None:
            interval = list(self.difference.interval)
            shown["difference"] = {**asdict(self.difference), "interval": interval}
        return shown


def summarise(measured: Sequence[Measured]) -> dict[str, dict[str, Figure]]:
    """Figures by row and metric, rows in the order in which they were first measured.

    Rows of one repeat share their starting noise, so the difference of two rows is taken within
    each repeat before it is averaged. Details are those of the first repeat.
    """
    rows: dict[str, list[Measured]] = {}
    for record in measured:
        rows.setdefault(record.row, []).append(record)
    first = next(iter(rows))
    theirs = {record.repeat: record.values for record in rows[first]}
    figures: dict[str, dict[str, Figure]] = {}
    for name, records in rows.items():
        shared = [record for record in records if record.repeat in theirs and name != first]
        figures[name] = {}
        for metric in records[0].values:
            values = tuple(record.values[metric] for record in records)
            pairs = [record.values[metric] - theirs[record.repeat][metric] for record in shared]
            sds = [float(np.std(s, ddof=1)) if len(s) > 1 else None for s in (values, pairs)]
            difference = None
            if sds[1] is not None:
                difference = Difference(first, float(np.mean(pairs)), sds[1], interval_of(pairs))
            details = records[0].details.get(metric, {})
            figures[name][metric] = Figure(
                float(np.mean(values)), sds[0], records[0].n, values, difference, details
            )
    return figures


def interval_of(sample: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two numbers or more (Student's t)."""
    from scipy.special import stdtrit

    count, mean = len(sample), float(np.mean(sample))
    half = float(stdtrit(count - 1, 0.975)) * float(np.std(sample, ddof=1)) / count**0.5
    return mean - half, mean + half
