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
from functools import partial
from typing import Any

import numpy as np

from deme_cli import console
from deme_cli.console import Progress, Step
from deme_cli.errors import NumericsError
from deme_cli.jobs import StopRequests
from deme_cli.merging.candidates import Workbench
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.methods import LINEAR
from deme_cli.merging.objectives import HeldOutLoss, Objective
from deme_cli.merging.plan import REPORT
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


def make_report(bench: Workbench, given: Coefficients | None, progress: Progress) -> dict[str, Any]:
    """Measure base, ensemble, plain means, the soup, single experts and what `given` merges.

    The loss with its ranges is taken in any case, and the last stage if another, for every seed.
    Raises NumericsError where the base is not finite.
    """
    plan, settings, last = bench.plan, bench.plan.settings, bench.plan.stages[-1]
    num = settings.report_num or last.num
    stages = [Stage("loss", settings.report_num or max(num, settings.num), 1)]
    has_ensemble = plan.inputs.ensemble is not None
    if last.is_distance or (last.name == "experts" and has_ensemble):
        stages.append(replace(last, num=num))
    seeds = [replace(settings, loss_range=None, seed=settings.report_seed + repeat)
             for repeat in range(settings.report_repeats)]  # fmt: skip
    metrics = [[bench.open(stage, config, REPORT) for config in seeds] for stage in stages]
    if not has_ensemble:
        note = "the experts do not cover all timesteps: no ensemble, no share of its gain"
        progress(Step(note=note))
    rows = report_rows(bench, given)
    progress(Step(0, len(rows), "report", "row"))
    ranges = sorted({expert.record.timesteps for expert in plan.inputs.experts})
    documents: list[dict[str, Any]] = []
    rivals: dict[str, list[Sample]] = {}
    deciding = metrics[-1][0].name
    with StopRequests() as stop:

        def check(*done: int) -> None:
            if stop.asked:
                raise stop.stopped("stopped in the report; run the same command again to continue")

        for document, samples in measure_rows(rows, metrics, ranges, check):
            documents.append(document)
            progress(Step(len(documents), len(rows), "report", "row", detail=document["name"]))
            rivals[document["name"]] = samples[deciding]
    low, _ = documents[-1]["metrics"][deciding]["interval"]
    if low is not None and low > 0:
        console.warn(
            "on other seeds and images the merged model is worse than the base: raise --num, vary "
            "fewer coefficients (--per block or model), or keep the base"
        )
    return {
        "rows": documents,
        "protocols": [{**one[0].protocol, "seeds": len(one)} for one in metrics],
        "selection_seed": settings.seed,
        "verdict": verdict(deciding, rivals.pop(MERGED), rivals),
    }


def report_rows(bench: Workbench, given: Coefficients | None) -> list[Row]:
    """Base, ensemble, 1/N each, all 1, the soup, each expert alone, and the merged model."""
    search, names, count = bench.plan.search, bench.plan.names, len(bench.plan.names)
    alone = [(f"expert {name}", [float(i == k) for i in range(count)])
             for k, name in enumerate(names)]  # fmt: skip
    plain = [(BASE, [0.0] * count), ("1/N each", [1 / count] * count), ("1 each", [1.0] * count)]
    shown = [*plain, *alone] if count > 1 else plain[:2]
    rows: list[Row] = [(name, w, partial(bench.at, w, LINEAR)) for name, w in shown]
    if count > 1 and search and search.soup:
        found = search.space.coefficients(search.soup)
        values = list(search.space.summary(search.soup))
        rows.insert(len(plain), (SOUP, values, partial(bench.at, found)))
    if bench.inputs.ensemble is not None:
        rows.insert(1, (ENSEMBLE, None, bench.ensemble))
    return [*rows, (MERGED, given.values if given else None, partial(bench.written, given))]


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
        for objective in [one for metric in metrics for one in metric]:
            for key, sample in _samples(objective, model(), ranges, check):
                samples.setdefault(key, []).append(sample)
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
    objective: Objective, model: Sequence[SamplingExpert], ranges: Sequence[TimestepRange],
    check: Check,
) -> Iterator[tuple[str, Sample]]:  # fmt: skip
    """What a model gives for one seed: of a loss the whole and each range, of a distance the one.

    Of a mean over draws the bootstrap draws images, with all their draws; of a distance among the
    generated ones.
    """
    if isinstance(objective, HeldOutLoss):
        errors, images = objective.errors(model, check).numpy(), objective.draws.images.numpy()
        spans = {f"{objective.name} {span}": objective.draws_in(span).numpy() for span in ranges}
        whole = {objective.name: np.ones(len(errors), bool)}
        for key, mine in (whole | spans if len(ranges) > 1 else whole).items():
            if mine.any():  # a t may belong to no expert
                known, place = np.unique(images[mine], return_inverse=True)
                sums, counts = np.bincount(place, weights=errors[mine]), np.bincount(place)
                again = partial(_mean_again, sums, counts)
                value, units = float(errors[mine].mean()), tuple(known.tolist())
                yield key, Sample(value, len(known), again, units=units)
        return
    try:
        features = objective.features(model, check)
    except NumericsError:
        yield objective.name, Sample(float("nan"), 1, lambda chosen: float("nan"), 1)
        return
    # of a kernel distance, too: a mean over many subsets costs as much as a hundred
    few = objective.is_kernel or features.shape[1] > WIDE
    yield objective.name, Sample(
        objective.distance(features), len(features),
        lambda chosen: objective.distance(features[chosen]), WIDE_RESAMPLES if few else RESAMPLES,
    )  # fmt: skip


def _mean_again(sums: np.ndarray, counts: np.ndarray, chosen: np.ndarray) -> float:
    return float(sums[chosen].sum() / counts[chosen].sum())


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


def verdict(metric: str, merged: list[Sample], rows: dict[str, list[Sample]]) -> str:
    """One line: what the merged model is worth on other seeds, and against whom that is sure."""
    value = float(np.mean([sample.value for sample in merged]))
    if not np.isfinite(value):
        return f"on other seeds and images: {metric} is not finite"
    against = {name: _difference(merged, rows[name]) for name in rows if name in RIVALS}
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
