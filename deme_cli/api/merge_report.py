"""What `deme merge` shows of a search and its report: tables of trials and of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.caching import fill_with_bar
from deme_cli.jobs import StopRequests

if TYPE_CHECKING:
    from deme_cli.merging.request import Request
    from deme_cli.merging.search.evaluator import Evaluator
    from deme_cli.merging.search.objectives import Workbench
    from deme_cli.merging.search.report import Meter, ReportRow, Row
    from deme_cli.merging.search.space import Point
    from deme_cli.merging.search.trials import Trial


def show_trials(
    title: str, ranking: Sequence[Trial], summary: Callable[[Point], Sequence[float]],
    experts: Sequence[str], label: str, *, shown: int,
) -> None:  # fmt: skip
    """The first of a ranking as a table, and below them the base and the mean with their places."""
    from deme_cli.merging.search.trials import REFERENCES

    kept = [
        (place, trial) for place, trial in enumerate(ranking, start=1)
        if place <= shown or trial.name in REFERENCES
    ]  # fmt: skip
    places = console.decimals([trial.value for _, trial in kept], 5)
    what = "mean w" if kept and len(kept[0][1].point) > len(experts) else "w"
    console.table(
        title,
        ["place", *(f"{what} {name}" for name in experts), label, "seconds"],
        [
            [f"{place} {trial.name}".strip(), *(f"{w:.3f}" for w in summary(trial.point)),
             f"{trial.value:.{places}f}" if math.isfinite(trial.value) else "not finite",
             f"{trial.seconds:.1f}"]
            for place, trial in kept
        ],
    )  # fmt: skip


def report(
    request: Request, bench: Workbench, evaluator: Evaluator, soup: Point | None, merged: Row
) -> dict[str, Any]:
    """Measure base, ensemble, plain means, single experts and the merged model; show and return.

    Raises NumericsError where the base is not finite.
    """
    from deme_cli.merging.search.report import measure_rows, open_meters, report_rows, verdict

    fill_with_bar(bench.examples)
    meters = open_meters(request, bench, evaluator)
    rows = report_rows(request, evaluator, soup, merged)
    if all(name != "ensemble" for name, *_ in rows):
        console.note("the experts do not cover all timesteps: no ensemble, no share of its gain")
    measured: list[ReportRow] = []
    with StopRequests() as stop, console.progress("report", len(rows), "row") as bar:

        def check(*progress: int) -> None:
            if stop.asked:
                raise stop.stopped("stopped in the report; run the same command again to continue")

        for row in measure_rows(rows, meters, evaluator.ranges, check):
            measured.append(row)
            bar.advance(len(measured), row.name)
    for meter in meters:
        _show_rows(measured, meter)
    _show_ranges(measured, meters[0].objectives[0].name)
    low, _ = measured[-1].metrics[meters[-1].objectives[0].name].interval
    if low > 0:
        console.warn(
            "on other seeds and images the merged model is worse than the base: raise --num, vary "
            "fewer coefficients (--per block or model), or keep the base"
        )
    return {
        "rows": [row.document for row in measured],
        "protocols": [meter.protocol for meter in meters],
        "selection_seed": request.settings.seed,
        "verdict": verdict(measured, meters[-1]),
    }


def _show_rows(measured: Sequence[ReportRow], meter: Meter) -> None:
    """The table of a metric: value, difference to the base with its interval, gain kept."""
    objective = meter.objectives[0]
    estimates = [row.metrics[objective.name] for row in measured]
    halves = [one.half for one in estimates if one.half > 0]
    places = console.decimals(halves, 2) if halves else 4
    rows = []
    for row, one in zip(measured, estimates, strict=True):
        is_finite = math.isfinite(one.value)
        rows.append([
            row.name,
            f"{one.value:.{places}f}" if is_finite else "not finite",
            "" if row is measured[0] or not is_finite
            else f"{one.difference:+.{places}f} ± {one.half:.{places}f}",
            "" if one.gain_kept is None else f"{100 * one.gain_kept:.0f} %",
        ])  # fmt: skip
    console.table(
        f"{objective.label}: {objective.protocol['num']} a seed, {len(meter.objectives)} seeds of "
        f"the report",
        ["model", "value", "minus base (95 %)", "gain kept"],
        rows,
    )


def _show_ranges(measured: Sequence[ReportRow], name: str) -> None:
    """Where the models gained and lost, in per cent of the base's loss."""
    base = measured[0].metrics
    spans = [metric for metric in base if metric.startswith(f"{name} ")]
    if spans:
        console.table(
            "Loss by range of timesteps, change against the base in %",
            ["model", *(span.removeprefix(f"{name} ") for span in spans)],
            [
                [row.name, *(f"{100 * row.metrics[span].difference / base[span].value:+.2f}"
                             for span in spans)]
                for row in measured[1:]
                if math.isfinite(row.metrics[name].value)
            ],
        )  # fmt: skip
