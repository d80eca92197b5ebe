"""The report of `deme merge`: the merged model beside others, on seeds and images of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.caching import fill_with_bar
from deme_cli.api.merge_order import Order
from deme_cli.interrupts import StopRequests
from deme_cli.ladder import Rung

if TYPE_CHECKING:
    from deme_cli.merging.search.evaluator import Evaluator
    from deme_cli.merging.search.objectives import Workbench
    from deme_cli.merging.search.report import Meter, Model, ReportRow
    from deme_cli.merging.search.space import Point

MERGED = "merged"


@dataclass(frozen=True)
class RowToReport:
    """The row that the report is about: its coefficients by argument, and how to load it."""

    coefficients: Sequence[float] | None
    model: Model


def report(
    order: Order, bench: Workbench, evaluator: Evaluator, merged: RowToReport,
    soup: Point | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure base, ensemble, plain means, single experts and the merged model; show and return.

    `evaluator` gives the linear candidates. Raises NumericsError where the base is not finite.
    """
    from deme_cli.merging.search.report import measure_rows

    fill_with_bar(bench.examples)
    meters = _meters(order, bench, evaluator)
    rows = _rows(order, evaluator, merged, soup)
    ranges = sorted({parent.record.timesteps for parent in order.family.parents})
    measured: list[ReportRow] = []
    with (
        StopRequests() as stop,
        console.progress("report", len(rows), "row") as bar,
    ):

        def check(*progress: int) -> None:
            if stop.asked:
                raise stop.stopped("stopped in the report; run the same command again to continue")

        for row in measure_rows(rows, meters, ranges, check):
            measured.append(row)
            bar.advance(len(measured), row.name)
    document = {
        "rows": [row.document for row in measured],
        "protocols": [meter.protocol for meter in meters],
        "selection_seed": order.settings.seed,
    }
    _show(measured, meters)
    warn_if_worse(measured, meters[-1].objectives[0].name)
    return document


def _meters(order: Order, bench: Workbench, evaluator: Evaluator) -> list[Meter]:
    """The loss with its ranges in any case, and the last rung if another, for every seed."""
    from deme_cli.merging.search.evaluator import has_ensemble
    from deme_cli.merging.search.objectives import REPORT
    from deme_cli.merging.search.report import Meter

    settings, last = order.settings, order.rungs[-1]
    num = settings.report_num or last.num
    rungs = [Rung("loss", max(num, settings.num) if settings.report_num is None else num, 1)]
    if last.is_distance or (last.name == "experts" and has_ensemble(order.family)):
        rungs.append(replace(last, num=num))
    seeds = [settings.report_seed + repeat for repeat in range(settings.report_repeats)]
    whole = replace(settings, loss_range=None)
    return [
        Meter(
            [
                bench.open(rung, replace(whole, seed=seed), part=REPORT, experts=evaluator.ensemble)
                for seed in seeds
            ]
        )
        for rung in rungs
    ]


def _rows(
    order: Order, evaluator: Evaluator, merged: RowToReport, soup: Point | None
) -> list[tuple[str, Sequence[float] | None, Model]]:
    """Base, ensemble, 1/N each, all 1, the soup, each expert alone, and the merged model."""
    from deme_cli.merging.search.evaluator import has_ensemble
    from deme_cli.merging.search.report import BASE, ENSEMBLE

    space, count = evaluator.space, len(order.family.parents)

    def at(values: Sequence[float]) -> Model:
        return lambda: evaluator.linear(values)

    rows: list[tuple[str, Sequence[float] | None, Callable]] = [
        (BASE, [0.0] * count, at([0.0] * count))
    ]
    if has_ensemble(order.family):
        rows.append((ENSEMBLE, None, evaluator.ensemble))
    else:
        console.note("the experts do not cover all timesteps: no ensemble, no share of its gain")
    mean, ones = [1 / count] * count, [1.0] * count
    rows.append(("1/N each", mean, at(mean)))
    if count > 1:
        rows.append(("1 each", ones, at(ones)))
        if soup is not None:
            rows.append(("greedy soup", space.summary(soup), lambda: evaluator.model(soup)))
        for index, name in enumerate(order.experts):
            alone = [float(i == index) for i in range(count)]
            rows.append((f"expert {name}", alone, at(alone)))
    rows.append((MERGED, merged.coefficients, merged.model))
    return rows


def _show(measured: Sequence[ReportRow], meters: Sequence[Meter]) -> None:
    """One table per metric: value, difference to the base with its interval, gain kept."""
    for meter in meters:
        objective = meter.objectives[0]
        rows = []
        for row in measured:
            estimate = row.metrics[objective.name]
            low, high = estimate.interval
            half = (high - low) / 2
            is_finite = math.isfinite(estimate.value)
            is_plain = row is measured[0] or not is_finite
            rows.append([
                row.name,
                f"{estimate.value:.5g}" if is_finite else "not finite",
                "" if is_plain else f"{estimate.difference:+.3g} ± {half:.2g}",
                "" if estimate.gain_kept is None else f"{100 * estimate.gain_kept:.0f} %",
            ])  # fmt: skip
        seeds = len(meter.objectives)
        console.table(
            f"{objective.label}: {objective.protocol['num']} a seed, {seeds} seeds of the report",
            ["model", "value", "minus base (95 %)", "gain kept"],
            rows,
        )
    _show_ranges(measured, meters[0].objectives[0].name)


def warn_if_worse(measured: Sequence[ReportRow], metric: str) -> None:
    """Say it where the merged model, the last row, is worse than the base beyond its interval."""
    low, _ = measured[-1].metrics[metric].interval
    if low > 0:
        console.warn(
            "on other seeds and images the merged model is worse than the base: raise --num, vary "
            "fewer coefficients (--per block or model), or keep the base"
        )


def _show_ranges(measured: Sequence[ReportRow], name: str) -> None:
    """Where the merged model and the ensemble gained and lost, in per cent of the base's loss."""
    base = measured[0]
    spans = [metric for metric in base.metrics if metric.startswith(f"{name} ")]
    if not spans:
        return
    rows = [
        [
            row.name,
            *(
                f"{100 * row.metrics[span].difference / base.metrics[span].value:+.2f}"
                for span in spans
            ),
        ]
        for row in measured[1:]
        if math.isfinite(row.metrics[name].value)
    ]
    console.table(
        "Loss by range of timesteps, change against the base in %",
        ["model", *(span.removeprefix(f"{name} ") for span in spans)],
        rows,
    )
