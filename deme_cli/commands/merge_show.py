"""What `deme merge` shows: the trials of a search, the merged model, and its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.merging.successive_halving import label_of

if TYPE_CHECKING:
    from deme_cli.merging.merge import MergeResult
    from deme_cli.merging.show_search import ShownSearch
    from deme_cli.merging.space import Trial

_SHOWN = 10  # of each stage
_REFERENCES = ("base", "1/N each")


def show_search(search: ShownSearch, stages: Sequence[int]) -> None:
    """The best trials of each of these stages as a table, below them the base and the mean with
    their places; of groups their mean."""
    groups = len(search.search["groups"])
    count = len(search.labels) // groups
    columns = [f"{'mean w' if groups > 1 else 'w'} {name}" for name in search.experts]
    for stage in stages:
        own = search.best_of_stage(stage)
        kept = [
            (place, trial) for place, trial in enumerate(own, start=1)
            if place <= _SHOWN or trial.name in _REFERENCES
        ]  # fmt: skip
        places = console.decimals([trial.value for _, trial in kept], 5)
        label = label_of(search.objectives[stage])
        rows = [
            [f"{place} {trial.name}".strip(),
             *(f"{sum(trial.point[i::count]) / groups:.3f}" for i in range(count)),
             f"{trial.value:.{places}f}" if math.isfinite(trial.value) else "not finite",
             f"{trial.seconds:.1f}"]
            for place, trial in kept
        ]  # fmt: skip
        if rows:
            title = f"{label}: the best of {len(own)}"
            console.table(title, ["place", *columns, label, "seconds"], rows)


def tell_search(search: ShownSearch, *, as_json: bool) -> None:
    """The trials of a search, and the best so far: `--show`."""
    done = [trial for trial in search.trials if trial.is_done]
    console.note(
        f"{search.journal}: search {search.search['method']} by {' > '.join(search.objectives)}, "
        f"{'finished' if search.is_finished else 'not finished'}: {len(done)} trials, "
        f"{len(search.trials) - len(done)} running"
    )
    show_search(search, range(len(search.objectives)))
    documents = [_document(trial, search.labels) for trial in done]
    if search.picture is None or search.best is None:
        console.result_paths([], as_json=as_json, trials=documents, finished=False)
    else:
        console.result_paths(
            [search.picture], as_json=as_json, finished=search.is_finished,
            best=_document(search.best, search.labels), trials=documents,
        )  # fmt: skip


def _document(trial: Trial, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "index": trial.index, "rung": trial.stage, "name": trial.name,
        "coefficients": dict(zip(labels, trial.point, strict=True)),
        "objective": trial.value if math.isfinite(trial.value) else None,
        "seconds": round(trial.seconds, 3),
    }  # fmt: skip


def tell_merged(merged: MergeResult, *, as_json: bool) -> None:
    """The merged file, what it was made of, the files beside it, and what it is worth."""
    record, search = merged.record, merged.record.search
    if merged.search:
        show_search(merged.search, [len(merged.search.objectives) - 1])
    if record.report:
        show_report(record.report)
    what = "coefficient (other tensors)" if record.coefficients_for else "coefficient"
    pairs = zip(record.parents, record.coefficients, strict=True)
    places = max(console.decimals(record.coefficients, 3), 2)
    console.table(
        f"Merged into {merged.path} ({record.method})",
        ["timesteps", what, "from"],
        [
            [":".join(map(str, parent["range"])), f"{w:.{places}f}", parent["path"]]
            for parent, w in sorted(pairs, key=lambda pair: pair[0]["range"])
        ],
    )
    if record.report:
        console.note(f"{merged.path}: {record.report['verdict']}")
    elif search and search["evaluations"]:
        base, best = search["values"]["base"], search["best"]
        console.note(
            f"{merged.path}: {search['objective']} {best:.5g}, the base "
            f"{'not finite' if base is None else format(base, '.5g')}, on the seeds and images "
            f"that chose the coefficients; leave out --no-report to see it on others"
        )
    console.result_paths(
        [merged.path, *merged.files], as_json=as_json, path=str(merged.path),
        fingerprint=record.fingerprint, parents=record.parents, method=record.method,
        coefficients=record.coefficients, coefficients_for=record.coefficients_for,
        objective=search["best"] if search else None,
        evaluations=search["evaluations"] if search else 0, search=search, report=record.report,
    )  # fmt: skip


def show_report(report: dict[str, Any]) -> None:
    """A table for each metric: value, difference to the base with its interval, gain kept; and
    where the models gained and lost, in per cent of the base's loss."""
    rows = report["rows"]
    for protocol in report["protocols"]:
        own = [(row["name"], row["metrics"][protocol["name"]]) for row in rows]
        halves = [half for _, metric in own if (half := _half(metric)) > 0]
        places = console.decimals(halves, 2) if halves else 4
        table = []
        for name, metric in own:
            is_finite = metric["value"] is not None
            kept, difference = metric["gain_kept"], metric["difference"]
            table.append([
                name,
                f"{metric['value']:.{places}f}" if is_finite else "not finite",
                "" if metric is own[0][1] or not is_finite
                else f"{difference:+.{places}f} ± {_half(metric):.{places}f}",
                "" if kept is None else f"{100 * kept:.0f} %",
            ])  # fmt: skip
        console.table(
            f"{label_of(protocol['name'])}: {protocol['num']} a seed, {protocol['seeds']} seeds of "
            f"the report",
            ["model", "value", "minus base (95 %)", "gain kept"],
            table,
        )
    loss = report["protocols"][0]["name"]
    spans = [metric for metric in rows[0]["metrics"] if metric.startswith(f"{loss} ")]
    if spans:
        base = rows[0]["metrics"]
        console.table(
            "Loss by range of timesteps, change against the base in %",
            ["model", *(span.removeprefix(f"{loss} ") for span in spans)],
            [
                [row["name"],
                 *(f"{100 * row['metrics'][span]['difference'] / base[span]['value']:+.2f}"
                   for span in spans)]
                for row in rows[1:]
                if row["metrics"][loss]["value"] is not None
            ],
        )  # fmt: skip


def _half(metric: dict[str, Any]) -> float:
    """Half the width of the interval, 0 where there is none."""
    low, high = metric["interval"]
    return 0.0 if low is None else (high - low) / 2
