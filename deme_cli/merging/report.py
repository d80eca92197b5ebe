"""The honest figures: what was chosen on one set of seeds and images, measured on another.

Every row is measured by the same objectives with seeds of the report and, where there are any, on
images the search has not seen. Rows share their draws and their noise, so a row is told by its
difference to the base, with an interval from a paired bootstrap (Efron & Tibshirani 1993) over
images. The gain kept is the share of the ensemble's gain that a single network keeps:

    (base - row) / (base - ensemble)

The merged model, the last row, is compared in the same way with ensemble and greedy soup as well.
n draws or images of a seed, R seeds, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli import console
from deme_cli.console import Progress, Step
from deme_cli.errors import NumericsError
from deme_cli.jobs import StopRequests
from deme_cli.merging.candidates import Evaluator, has_ensemble
from deme_cli.merging.objectives import (
    REPORT,
    GeneratedDistance,
    HeldOutLoss,
    Objective,
    Workbench,
)
from deme_cli.merging.space import Point
from deme_cli.merging.successive_halving import Stage
from deme_cli.sampling.ensemble import SamplingExpert
from deme_cli.timesteps import TimestepRange
from deme_cli.training.batches import Check

if TYPE_CHECKING:
    from deme_cli.merging.plan import MergePlan

RESAMPLES, WIDE_RESAMPLES, WIDE = 200, 25, 512  # fewer where features are many: each costs d^3
BASE, ENSEMBLE, SOUP, MERGED = "base", "ensemble", "greedy soup", "merged"
RIVALS = (BASE, SOUP, ENSEMBLE)
Model = Callable[[], Sequence[SamplingExpert]]
Row = tuple[str, Sequence[float] | None, Model]  # its name, its coefficients, how to load it
Metric = Sequence[Objective]  # one objective, opened for each of R seeds
Difference = tuple[float, float]  # and half of its interval


@dataclass(frozen=True)
class Estimate:
    """One metric of one row, the mean over seeds, and its difference to the base.

    `interval` holds the difference plus and minus 1.96 bootstrap standard errors; `gain_kept` is
    None for the base, the ensemble itself, and where the ensemble gained nothing. Where the row is
    not finite, neither are its difference and interval.
    """

    value: float
    values: tuple[float, ...]
    difference: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    gain_kept: float | None = None
    against: Mapping[str, Difference] = field(default_factory=dict)  # of the merged model, by rival


@dataclass(frozen=True)
class ReportRow:
    """A model of the report: its coefficients as recorded, and its estimates by metric."""

    name: str
    coefficients: Sequence[float] | None
    metrics: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        coefficients = None if self.coefficients is None else list(self.coefficients)
        return {
            "name": self.name,
            "coefficients": coefficients,
            "metrics": {
                metric: {
                    "value": _finite(estimate.value),
                    "values": [_finite(value) for value in estimate.values],
                    "difference": _finite(estimate.difference),
                    "interval": [_finite(end) for end in estimate.interval],
                    "gain_kept": estimate.gain_kept,
                }
                for metric, estimate in self.metrics.items()
            },
        }  # fmt: skip


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if np.isfinite(value) else None


def make_report(
    plan: MergePlan, bench: Workbench, evaluator: Evaluator, soup: Point | None, merged: Row,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Measure base, ensemble, plain means, single experts and the merged model.

    Raises NumericsError where the base is not finite.
    """
    metrics = open_metrics(plan, bench, evaluator)
    rows = report_rows(plan, evaluator, soup, merged)
    if not has_ensemble(plan.inputs):
        note = "the experts do not cover all timesteps: no ensemble, no share of its gain"
        progress(Step(note=note))
    progress(Step(0, len(rows), "report", "row"))
    measured: list[ReportRow] = []
    with StopRequests() as stop:

        def check(*done: int) -> None:
            if stop.asked:
                raise stop.stopped("stopped in the report; run the same command again to continue")

        for row in measure_rows(rows, metrics, evaluator.ranges, check):
            measured.append(row)
            progress(Step(len(measured), len(rows), "report", "row", detail=row.name))
    low, _ = measured[-1].metrics[metrics[-1][0].name].interval
    if low > 0:
        console.warn(
            "on other seeds and images the merged model is worse than the base: raise --num, vary "
            "fewer coefficients (--per block or model), or keep the base"
        )
    return {
        "rows": [row.document for row in measured],
        "protocols": [{**one[0].protocol, "seeds": len(one)} for one in metrics],
        "selection_seed": plan.settings.seed,
        "verdict": verdict(measured, metrics[-1]),
    }


def measure_rows(
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    ranges: Sequence[TimestepRange],
    check: Check,
) -> Iterator[ReportRow]:
    """Measure the rows in order; the base comes first, then the ensemble if there is one.

    `ranges` are those of the experts: a loss is told for each of them, as `loss 250:500`, besides
    the whole. Raises NumericsError where the base itself is not finite.
    """
    base: dict[str, list[_Sample]] = {}
    gains: dict[str, float] = {}
    rivals: dict[str, dict[str, list[_Sample]]] = {}  # by metric and row
    for name, coefficients, model in rows:
        found: dict[str, Estimate] = {}
        for opened in metrics:
            samples = _samples(opened, model, ranges, check)
            for metric, taken in samples.items():
                first = base.setdefault(metric, taken)
                found[metric] = estimate = _estimate(taken, first, gains.get(metric))
                if name == ENSEMBLE:
                    gains[metric] = -estimate.difference
                if name in RIVALS:
                    rivals.setdefault(metric, {})[name] = taken
                if name == MERGED:
                    against = {
                        rival: _difference(taken, theirs)
                        for rival, theirs in rivals.get(metric, {}).items()
                    }
                    found[metric] = replace(estimate, against=against)
        if name == BASE and not all(np.isfinite(e.value) for e in found.values()):
            raise NumericsError("the base's own figures are not finite; try --dtype fp32")
        yield ReportRow(name, coefficients, found)


@dataclass(frozen=True)
class _Sample:
    """What a row gave for one seed: its value, and how to take it again of resampled images."""

    value: float
    size: int
    again: Callable[[np.ndarray], float]
    resamples: int = RESAMPLES
    units: tuple[int, ...] = ()  # numbers of the images, where other seeds have the same


def _samples(
    objectives: Metric, model: Model, ranges: Sequence[TimestepRange], check: Check
) -> dict[str, list[_Sample]]:
    """The samples of one row by metric, one for each seed."""
    found: dict[str, list[_Sample]] = {}
    for objective in objectives:
        if isinstance(objective, GeneratedDistance):
            found.setdefault(objective.name, []).append(_of_distance(objective, model(), check))
            continue
        assert isinstance(objective, HeldOutLoss)
        errors = objective.errors(model(), check).numpy()
        images = objective.draws.images.numpy()
        found.setdefault(objective.name, []).append(_of_errors(errors, images))
        if len(ranges) > 1:
            for span in ranges:
                mine = objective.draws_in(span).numpy()  # a t may belong to no expert
                if mine.any():
                    name = f"{objective.name} {span}"
                    found.setdefault(name, []).append(_of_errors(errors[mine], images[mine]))
    return found


def _of_errors(errors: np.ndarray, images: np.ndarray) -> _Sample:
    """A mean over draws; the bootstrap draws images, with all their draws in every seed."""
    known, place = np.unique(images, return_inverse=True)
    totals, counts = np.bincount(place, weights=errors), np.bincount(place)

    def again(chosen: np.ndarray) -> float:
        return float(totals[chosen].sum() / counts[chosen].sum())

    return _Sample(float(errors.mean()), len(known), again, units=tuple(known.tolist()))


def _of_distance(
    objective: GeneratedDistance, model: Sequence[SamplingExpert], check: Check
) -> _Sample:
    """A distance of generated images; the bootstrap draws among them."""
    try:
        features = objective.features(model, check)
    except NumericsError:
        return _Sample(float("nan"), 1, lambda chosen: float("nan"), 1)
    resamples = RESAMPLES if features.shape[1] <= WIDE else WIDE_RESAMPLES
    if objective.is_kernel:
        resamples = WIDE_RESAMPLES  # a mean over many subsets: each costs as much as a hundred
    return _Sample(
        objective.distance(features), len(features),
        lambda chosen: objective.distance(features[chosen]), resamples,
    )  # fmt: skip


def _estimate(row: list[_Sample], base: list[_Sample], gain: float | None) -> Estimate:
    """The mean over seeds, the difference to the base, its interval, and the gain kept."""
    values = tuple(sample.value for sample in row)
    value = float(np.mean(values))
    if not np.isfinite(value):
        return Estimate(value, values, float("nan"), (float("nan"), float("nan")))
    if row is base:
        return Estimate(value, values)
    difference, half = _difference(row, base)
    kept = -difference / gain if gain is not None and gain > 0 else None
    return Estimate(value, values, difference, (difference - half, difference + half), kept)


def _difference(row: list[_Sample], base: list[_Sample]) -> Difference:
    """The difference of the means over seeds, and 1.96 standard errors of a paired bootstrap."""
    difference = float(np.mean([a.value - b.value for a, b in zip(row, base, strict=True)]))
    if not np.isfinite(difference):
        return float("nan"), float("nan")
    draw = np.random.default_rng(0)
    resampled = []
    for _ in range(row[0].resamples):
        chosen = [draw.integers(0, sample.size, sample.size) for sample in row]
        if row[0].units and all(sample.units == row[0].units for sample in row):
            chosen = chosen[:1] * len(row)  # the seeds share their images
        pairs = zip(row, base, chosen, strict=True)
        resampled.append(np.mean([a.again(index) - b.again(index) for a, b, index in pairs]))
    return difference, 1.96 * float(np.std(resampled, ddof=1))


def report_rows(
    plan: MergePlan, evaluator: Evaluator, soup: Point | None, merged: Row
) -> list[Row]:
    """Base, ensemble, 1/N each, all 1, the soup, each expert alone, and the merged model."""
    space, count = evaluator.space, len(plan.inputs.experts)

    def at(values: Sequence[float]) -> Model:
        return lambda: evaluator.linear(values)

    rows: list[Row] = [(BASE, [0.0] * count, at([0.0] * count))]
    if has_ensemble(plan.inputs):
        rows.append((ENSEMBLE, None, evaluator.ensemble))
    mean, ones = [1 / count] * count, [1.0] * count
    rows.append(("1/N each", mean, at(mean)))
    if count > 1:
        rows.append(("1 each", ones, at(ones)))
        if soup is not None:
            rows.append((SOUP, space.summary(soup), lambda: evaluator.at(space.coefficients(soup))))
        for index, name in enumerate(plan.expert_names):
            alone = [float(i == index) for i in range(count)]
            rows.append((f"expert {name}", alone, at(alone)))
    return [*rows, merged]


def open_metrics(plan: MergePlan, bench: Workbench, evaluator: Evaluator) -> list[Metric]:
    """The loss with its ranges in any case, and the last stage if another, for every seed."""
    settings, last = plan.settings, plan.stages[-1]
    num = settings.report_num or last.num
    stages = [Stage("loss", max(num, settings.num) if settings.report_num is None else num, 1)]
    if last.is_distance or (last.name == "experts" and has_ensemble(plan.inputs)):
        stages.append(replace(last, num=num))
    seeds = [settings.report_seed + repeat for repeat in range(settings.report_repeats)]
    whole = replace(settings, loss_range=None)
    return [
        [
            bench.open(stage, replace(whole, seed=seed), part=REPORT, experts=evaluator.ensemble)
            for seed in seeds
        ]
        for stage in stages
    ]  # fmt: skip


def verdict(measured: Sequence[ReportRow], objectives: Metric) -> str:
    """One line: what the merged model is worth on other seeds, and against whom that is sure."""
    objective, merged = objectives[0], measured[-1].metrics[objectives[0].name]
    if not np.isfinite(merged.value):
        return f"on other seeds and images: {objective.label} is not finite"
    halves = [half for _, half in merged.against.values() if np.isfinite(half)]
    places = console.decimals(halves, 2) if any(halves) else 4
    words = []
    for rival, (difference, half) in merged.against.items():
        if not np.isfinite(difference):
            words.append(f"{rival} is not finite")
        elif difference == half == 0:
            words.append(f"the same as the {rival}")
        elif abs(difference) <= half:
            words.append(f"not told apart from the {rival} ({difference:+.{places}f} ± "
                         f"{half:.{places}f})")  # fmt: skip
        else:
            how = "better" if difference < 0 else "worse"
            words.append(f"{how} than the {rival} ({difference:+.{places}f} ± {half:.{places}f})")
    seeds = len(objectives)
    return (
        f"on {seeds} other seed{'s' if seeds > 1 else ''} and other images: {objective.label} "
        f"{merged.value:.{places}f}, {', '.join(words)}"
    )
