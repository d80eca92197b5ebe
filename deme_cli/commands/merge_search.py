"""What `deme merge --search` does: find what to measure with, try the grid, show what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.commands.caching import fill_with_bar
from deme_cli.config import (
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    MergeConfig,
    SampleConfig,
)
from deme_cli.errors import ConfigError
from deme_cli.interrupts import StopRequests
from deme_cli.outputs import claim, write_whole
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.merging.grid import Grid
    from deme_cli.merging.lineage import Family
    from deme_cli.merging.search import Search
    from deme_cli.merging.trials import Trial, TrialLog

_SHOWN_TRIALS = 10


@dataclass(frozen=True)
class Order:
    """What was asked, checked: whose coefficients, how they are found, where the result goes."""

    family: Family
    settings: MergeConfig
    output: Path
    device: str
    dtype: str
    force: bool


@dataclass(frozen=True)
class Measure:
    """What candidates are measured with: the run's images; for distances features and sampling.

    `pipeline` and `cache` are where frozen parts and their latents are, for models that have any.
    """

    images: DataConfig
    features: str
    resize: str
    sample: SampleConfig
    pipeline: str | None
    cache: str

    @property
    def source(self) -> str:
        return self.images.source


@dataclass(frozen=True)
class Found:
    """The best coefficients, how they were found, and the files that tell it."""

    coefficients: Sequence[float]
    objective: float
    search: dict[str, Any]
    log: TrialLog
    picture: Path


def find_measure(run: RunFile, order: Order, pipeline: str | None) -> Measure:
    """What the search will need, looked for before torch is loaded."""
    from deme_cli.data.places import find_place
    from deme_cli.evaluation.references import find_reference
    from deme_cli.evaluation.weights import choose_features, find_weights
    from deme_cli.training.plan import require_companions

    settings, images = order.settings, run.settings(DataConfig)
    source = images.source or _shared_source(order.family)
    if not source:
        raise ConfigError("no images to search with: set [data] source in deme.toml")
    evaluation = run.settings(EvalConfig)
    features = choose_features(evaluation.features, [source])
    if settings.objective == "loss":
        find_place(source)
    else:
        if settings.num < 2:
            raise ConfigError("num = 1: a Fréchet distance needs at least 2 images per candidate")
        weights = find_weights(features, evaluation.resize)
        find_reference(source, features, evaluation.resize, weights=weights, split="train")
        if evaluation.seed <= settings.seed < evaluation.seed + evaluation.repeats:
            console.warn(f"seed {settings.seed} is one that `deme eval` reports with; use another")
    sample = replace(
        run.settings(SampleConfig), num=settings.num, steps=settings.steps, seed=settings.seed,
        batch_size=settings.batch_size,
    )  # fmt: skip
    if sample.prompts:
        sample = replace(sample, prompts=run.seen(sample.prompts))
    pipeline = run.pipeline(pipeline)
    require_companions(order.family.base_record, pipeline)
    return Measure(
        replace(images, source=source), features, evaluation.resize, sample, pipeline,
        run.settings(FinetuneConfig).cache,
    )  # fmt: skip


def _shared_source(family: Family) -> str | None:
    """The images that all the experts were trained on, if these are the same."""
    sources = {parent.record.data.get("source") for parent in family.parents}
    return sources.pop() if len(sources) == 1 else None


def search_coefficients(order: Order, grid: Grid, measure: Measure) -> Found:
    """Try every point of the grid; show the best as a table and all as a picture."""
    from deme_cli.merging.trials import TrialLog, ranked

    search = _open_search(order, grid, measure)
    log = TrialLog(order.output.with_name(f"{order.output.stem}.trials.jsonl"), search.describe())
    trials: list[Trial] = []
    with (
        claim(log.path),
        StopRequests() as stop,
        console.progress("searching", len(search.points), "candidate") as bar,
    ):

        def check() -> None:
            if stop.asked:
                raise stop.stopped(
                    f"{len(log.values)} of {len(search.points)} candidates are saved in "
                    f"{log.path}; run the same command again to continue"
                )

        log.open(search.points, force=order.force)
        if log.values:
            console.note(f"{log.path}: continuing after {len(log.values)} candidates")
        for trial in search.trials(log, check, device=order.device):
            trials.append(trial)
            bar.advance(trial.index + 1, f"best {trial.best:.5g}")
    best = ranked(trials)[0]
    if best.index == 0:
        console.warn("no candidate is better than the base; the merged model is the base itself")
    picture = _show(order, trials, grid, search.objective.label)
    return Found(best.coefficients, best.objective, search.record(trials), log, picture)


def _open_search(order: Order, grid: Grid, measure: Measure) -> Search:
    """The search with its objective; torch is loaded here."""
    from deme_cli.merging.grid import grid_points
    from deme_cli.merging.objectives import open_objective
    from deme_cli.merging.search import Search

    objective = open_objective(
        order.settings, order.family.base_record, images=measure.images, sample=measure.sample,
        features=measure.features, resize=measure.resize, device=order.device, dtype=order.dtype,
        pipeline=measure.pipeline, cache=measure.cache, beside=order.family.base.path.parent,
    )  # fmt: skip
    fill_with_bar(objective.examples)
    return Search(order.family, grid, grid_points(grid), objective, order.settings, order.dtype)


def _show(order: Order, trials: Sequence[Trial], grid: Grid, label: str) -> Path:
    """A table and a picture with the experts sorted by range; returns the picture's path."""
    from deme_cli.merging.figure import draw_search

    by_range = order.family.by_range
    labels = [order.family.parents[index].record.label for index in by_range]
    trials = [
        replace(trial, coefficients=tuple(trial.coefficients[index] for index in by_range))
        for trial in trials
    ]
    _show_best(trials, labels, label)
    picture = order.output.with_name(f"{order.output.stem}.search.png")
    sorted_grid = tuple(grid[index] for index in by_range)
    write_whole(picture, [draw_search(trials, sorted_grid, labels, objective=label)])
    return picture


def _show_best(trials: Sequence[Trial], labels: Sequence[str], label: str) -> None:
    """The first ten of the ranking, and below them the base and the mean with their places."""
    from deme_cli.merging.trials import ranked

    references = {0: "base", 1: "1/N each"}
    rows = [
        [f"{place} {references.get(trial.index, '')}".strip(),
         *(f"{w:g}" for w in trial.coefficients), f"{trial.objective:.6g}"]
        for place, trial in enumerate(ranked(trials), start=1)
        if place <= _SHOWN_TRIALS or trial.index in references
    ]  # fmt: skip
    console.table(
        f"The best of {len(trials)} candidates",
        ["place", *(f"w {name}" for name in labels), label],
        rows,
    )
