"""The honest figures: what was chosen on one set of seeds and images, measured on another.

Every row is measured by the same objectives with seeds of the report and, where there are any, on
images the search has not seen. Rows share their draws and their noise, so a row is told by its
difference to the base, with an interval from a paired bootstrap (Efron & Tibshirani 1993) over
images. The gain kept is the share of the ensemble's gain that a single network keeps:

    (base - row) / (base - ensemble)

N experts, R seeds, n draws or images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deme_cli import console
from deme_cli.console import Progress, Step
from deme_cli.errors import NumericsError
from deme_cli.jobs import StopRequests
from deme_cli.merging.candidates import Workbench
from deme_cli.merging.coefficients import Coefficients, Point
from deme_cli.merging.objectives import GeneratedDistance, HeldOutLoss, Objective
from deme_cli.merging.plan import REPORT, ensemble_of
from deme_cli.merging.search import Stage
from deme_cli.sampling.ensemble import SamplingExpert
from deme_cli.timesteps import TimestepRange
from deme_cli.training.batches import Check

RESAMPLES, WIDE_RESAMPLES, WIDE = 200, 25, 512  # fewer where features are many: each costs d^3
BASE, ENSEMBLE, SOUP, MERGED = "base", "ensemble", "greedy soup", "merged"
RIVALS = (BASE, SOUP, ENSEMBLE)
Model = Callable[[], Sequence[SamplingExpert]]
Row = tuple[str, Sequence[float] | None, Model]  # its name, its coefficients, how to load it
Metric = Sequence[Objective]  # one objective, opened for each of R seeds


@dataclass(frozen=True)
class Sample:
    """What a row gave for one seed: its value, and how to take it again of resampled images."""

    value: float
    size: int
    again: Callable[[np.ndarray], float]
    resamples: int = RESAMPLES
    units: tuple[int, ...] = ()  # numbers of the images, where other seeds have the same


Samples = dict[str, list[Sample]]  # by metric, one for each seed


def make_report(
    bench: Workbench, given: Coefficients | None, soup: Point | None, progress: Progress
) -> dict[str, Any]:
    """Measure base, ensemble, plain means, single experts and the model merged with `given`.

    Raises NumericsError where the base is not finite.
    """
    plan, metrics, rows = bench.plan, open_metrics(bench), report_rows(bench, given, soup)
    if ensemble_of(plan.inputs) is None:
        note = "the experts do not cover all timesteps: no ensemble, no share of its gain"
        progress(Step(note=note))
    progress(Step(0, len(rows), "report", "row"))
    ranges = sorted({expert.record.timesteps for expert in plan.inputs.experts})
    documents: list[dict[str, Any]] = []
    rivals: dict[str, list[Sample]] = {}
    deciding, merged = metrics[-1][0].name, list[Sample]()
    with StopRequests() as stop:

        def check(*done: int) -> None:
            if stop.asked:
                raise stop.stopped("stopped in the report; run the same command again to continue")

        for document, samples in measure_rows(rows, metrics, ranges, check):
            documents.append(document)
            progress(Step(len(documents), len(rows), "report", "row", detail=document["name"]))
            merged = samples[deciding]
            if document["name"] in RIVALS:
                rivals[document["name"]] = merged
    low, _ = documents[-1]["metrics"][deciding]["interval"]
    if low is not None and low > 0:
        console.warn(
            "on other seeds and images the merged model is worse than the base: raise --num, vary "
            "fewer coefficients (--per block or model), or keep the base"
        )
    return {
        "rows": documents,
        "protocols": [{**one[0].protocol, "seeds": len(one)} for one in metrics],
        "selection_seed": plan.settings.seed,
        "verdict": verdict(deciding, merged, rivals),
    }


def report_rows(bench: Workbench, given: Coefficients | None, soup: Point | None) -> list[Row]:
    """Base, ensemble, 1/N each, all 1, the soup, each expert alone, and the merged model."""
    space, count = bench.plan.space, len(bench.inputs.experts)

    def at(name: str, values: Sequence[float]) -> Row:
        return name, list(values), lambda: bench.linear(values)

    rows: list[Row] = [at(BASE, [0.0] * count)]
    if ensemble_of(bench.inputs) is not None:
        rows.append((ENSEMBLE, None, bench.ensemble))
    rows.append(at("1/N each", [1 / count] * count))
    if count > 1:
        rows.append(at("1 each", [1.0] * count))
        if soup is not None:
            rows.append((SOUP, space.summary(soup), lambda: bench.at(space.coefficients(soup))))
        for index, name in enumerate(bench.plan.expert_names):
            rows.append(at(f"expert {name}", [float(i == index) for i in range(count)]))
    return [*rows, (MERGED, given.values if given else None, lambda: bench.at(given))]


def open_metrics(bench: Workbench) -> list[Metric]:
    """The loss with its ranges in any case, and the last stage if another, for every seed."""
    settings, last = bench.plan.settings, bench.plan.stages[-1]
    num = settings.report_num or last.num
    stages = [Stage("loss", settings.report_num or max(num, settings.num), 1)]
    if last.is_distance or (last.name == "experts" and ensemble_of(bench.inputs) is not None):
        stages.append(replace(last, num=num))
    whole = replace(settings, loss_range=None)
    return [
        [bench.open(stage, replace(whole, seed=settings.report_seed + repeat), REPORT)
         for repeat in range(settings.report_repeats)]
        for stage in stages
    ]  # fmt: skip


def measure_rows(
    rows: Sequence[Row], metrics: Sequence[Metric], ranges: Sequence[TimestepRange], check: Check
) -> Iterator[tuple[dict[str, Any], Samples]]:
    """Measure the rows in order; the base comes first, then the ensemble if there is one. Gives
    each as JSON has it, and its samples.

    `ranges` are those of the experts: a loss is told for each of them, as `loss 250:500`, besides
    the whole. Raises NumericsError where the base itself is not finite.
    """
    base: Samples = {}
    gains: dict[str, float] = {}
    for name, coefficients, model in rows:
        samples: Samples = {}
        for objectives in metrics:
            samples |= _samples(objectives, model, ranges, check)
        base = base or samples
        if (
            base is samples
            and not np.isfinite([one.value for taken in base.values() for one in taken]).all()
        ):
            raise NumericsError("the base's own figures are not finite; try --dtype fp32")
        figures = {m: _figures(taken, base[m], gains.get(m)) for m, taken in samples.items()}
        if name == ENSEMBLE:
            gains = {m: -(one["difference"] or 0.0) for m, one in figures.items()}
        coefficients = None if coefficients is None else list(coefficients)
        yield {"name": name, "coefficients": coefficients, "metrics": figures}, samples


def _samples(
    objectives: Metric, model: Model, ranges: Sequence[TimestepRange], check: Check
) -> Samples:
    """The samples of one row."""
    found: Samples = {}
    for objective in objectives:
        if isinstance(objective, GeneratedDistance):
            found.setdefault(objective.name, []).append(_of_distance(objective, model(), check))
            continue
        assert isinstance(objective, HeldOutLoss)
        errors = objective.errors(model(), check).numpy()
        images = objective.draws.images.numpy()
        found.setdefault(objective.name, []).append(_of_errors(errors, images))
        for span in ranges if len(ranges) > 1 else ():
            mine = objective.draws_in(span).numpy()  # a t may belong to no expert
            if mine.any():
                own = _of_errors(errors[mine], images[mine])
                found.setdefault(f"{objective.name} {span}", []).append(own)
    return found


def _of_errors(errors: np.ndarray, images: np.ndarray) -> Sample:
    """A mean over draws; the bootstrap draws images, with all their draws in every seed."""
    known, place = np.unique(images, return_inverse=True)
    totals, counts = np.bincount(place, weights=errors), np.bincount(place)

    def again(chosen: np.ndarray) -> float:
        return float(totals[chosen].sum() / counts[chosen].sum())

    return Sample(float(errors.mean()), len(known), again, units=tuple(known.tolist()))


def _of_distance(
    objective: GeneratedDistance, model: Sequence[SamplingExpert], check: Check
) -> Sample:
    """A distance of generated images; the bootstrap draws among them."""
    try:
        features = objective.features(model, check)
    except NumericsError:
        return Sample(float("nan"), 1, lambda chosen: float("nan"), 1)
    # of a kernel distance, too: a mean over many subsets costs as much as a hundred
    few = objective.is_kernel or features.shape[1] > WIDE
    return Sample(
        objective.distance(features), len(features),
        lambda chosen: objective.distance(features[chosen]), WIDE_RESAMPLES if few else RESAMPLES,
    )  # fmt: skip


def _figures(row: list[Sample], base: list[Sample], gain: float | None) -> dict[str, Any]:
    """The mean over seeds, the difference to the base, its interval (plus and minus 1.96 bootstrap
    standard errors), and the gain kept; None for what is not finite."""
    values = [sample.value for sample in row]
    difference, half = _difference(row, base)
    is_finite = bool(np.isfinite(values).all())
    return {
        "value": float(np.mean(values)) if is_finite else None,
        "values": [value if np.isfinite(value) else None for value in values],
        "difference": difference if is_finite else None,
        "interval": [difference - half, difference + half] if is_finite else [None, None],
        "gain_kept": -difference / gain if is_finite and gain is not None and gain > 0 else None,
    }


def _difference(row: list[Sample], base: list[Sample]) -> tuple[float, float]:
    """The difference of the means over seeds, and 1.96 standard errors of a paired bootstrap."""
    difference = float(np.mean([a.value - b.value for a, b in zip(row, base, strict=True)]))
    if row is base or not np.isfinite(difference):
        return difference, difference
    draw = np.random.default_rng(0)
    resampled = []
    for _ in range(row[0].resamples):
        chosen = [draw.integers(0, sample.size, sample.size) for sample in row]
        if row[0].units and all(sample.units == row[0].units for sample in row):
            chosen = chosen[:1] * len(row)  # the seeds share their images
        pairs = zip(row, base, chosen, strict=True)
        resampled.append(np.mean([a.again(index) - b.again(index) for a, b, index in pairs]))
    return difference, 1.96 * float(np.std(resampled, ddof=1))


def verdict(metric: str, merged: list[Sample], rivals: dict[str, list[Sample]]) -> str:
    """One line: what the merged model is worth on other seeds, and against whom that is sure."""
    value = float(np.mean([sample.value for sample in merged]))
    if not np.isfinite(value):
        return f"on other seeds and images: {metric} is not finite"
    against = {rival: _difference(merged, samples) for rival, samples in rivals.items()}
    halves = [half for _, half in against.values() if np.isfinite(half)]
    places = console.decimals(halves, 2) if any(halves) else 4
    words = []
    for rival, (difference, half) in against.items():
        apart = f"({difference:+.{places}f} ± {half:.{places}f})"
        if not np.isfinite(difference):
            words.append(f"{rival} is not finite")
        elif difference == half == 0:
            words.append(f"the same as the {rival}")
        elif abs(difference) <= half:
            words.append(f"not told apart from the {rival} {apart}")
        else:
            words.append(f"{'better' if difference < 0 else 'worse'} than the {rival} {apart}")
    seeds = "1 other seed" if len(merged) == 1 else f"{len(merged)} other seeds"
    return f"on {seeds} and other images: {metric} {value:.{places}f}, {', '.join(words)}"
