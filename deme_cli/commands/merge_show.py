"""What `deme merge` shows: the trials of a search, the merged model, and its report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from deme_cli import console

if TYPE_CHECKING:
    from deme_cli import MergeResult, ShownSearch
    from deme_cli.merging.journal import Trial

_SHOWN = 10  # of each stage


def tell_search(search: ShownSearch, *, as_json: bool) -> None:
    """The trials of a search, and the best so far: `--show`."""
    done = [trial for trial in search.trials if trial.is_done]
    console.note(
        f"{search.journal}: search {search.search['method']} by {' > '.join(search.objectives)}, "
        f"{'finished' if search.is_finished else 'not finished'}: {len(done)} trials, "
        f"{len(search.trials) - len(done)} running"
    )
    for stage in range(len(search.objectives)):
        _show_stage(search, stage)

    def told(trial: Trial) -> dict[str, Any]:
        return {
            "index": trial.index, "rung": trial.stage, "name": trial.name,
            "coefficients": dict(zip(search.labels, trial.point, strict=True)),
            "objective": trial.value if math.isfinite(trial.value) else None,
            "seconds": round(trial.seconds, 3),
        }  # fmt: skip

    best = {} if search.best is None else {"best": told(search.best)}
    console.result_paths(
        [search.picture] if search.picture else [], as_json=as_json, finished=search.is_finished,
        **best, trials=[told(trial) for trial in done],
    )  # fmt: skip


def _show_stage(search: ShownSearch, stage: int) -> None:
    """The best trials of a stage as a table, below them the base and the mean with their places; of
    groups their mean."""
    groups = search.search["groups"]
    count = len(search.labels) // len(groups)
    names = [label.removesuffix(f" {groups[0]}") for label in search.labels[:count]]
    own = [trial for trial in search.trials if trial.is_done and trial.stage == stage]
    own.sort(key=lambda t: (t.value, math.hypot(*t.point), t.index))
    kept = [(i, t) for i, t in enumerate(own, 1) if i <= _SHOWN or t.name in ("base", "1/N each")]
    places = console.decimals([trial.value for _, trial in kept], 5)
    label = search.objectives[stage]
    if kept:
        console.table(
            f"{label}: the best of {len(own)}",
            ["place", *(f"{'mean w' if len(groups) > 1 else 'w'} {name}" for name in names),
             label, "seconds"],
            [[f"{place} {trial.name}".strip(),
              *(f"{sum(trial.point[i::count]) / len(groups):.3f}" for i in range(count)),
              console.fixed(trial.value, places), f"{trial.seconds:.1f}"]
             for place, trial in kept],
        )  # fmt: skip


def tell_merged(merged: MergeResult, *, as_json: bool) -> None:
    """The merged file, what it was made of, the files beside it, and what it is worth."""
    record, search = merged.record, merged.record.search
    if merged.search:
        _show_stage(merged.search, len(merged.search.objectives) - 1)
    if record.report:
        _show_report(record.report)
    places = max(console.decimals(record.coefficients, 3), 2)
    pairs = zip(record.parents, record.coefficients, strict=True)
    console.table(
        f"Merged into {merged.path} ({record.method})",
        ["timesteps", "coefficient (other tensors)" if record.coefficients_for else "coefficient",
         "from"],
        [[":".join(map(str, parent["range"])), f"{w:.{places}f}", parent["path"]]
         for parent, w in sorted(pairs, key=lambda pair: pair[0]["range"])],
    )  # fmt: skip
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


def _show_report(report: dict[str, Any]) -> None:
    """A table for each metric: value, difference to the base with its interval, gain kept; and
    where the models gained and lost, in per cent of the base's loss."""
    rows = report["rows"]
    for protocol in report["protocols"]:
        own = [(row["name"], row["metrics"][protocol["name"]]) for row in rows]
        halves = [_half(metric) for _, metric in own if _half(metric)]
        places = console.decimals(halves, 2) if halves else 4
        table = []
        for name, metric in own:
            shown, apart, kept = "not finite", "", metric["gain_kept"]
            if metric["value"] is not None:
                shown = f"{metric['value']:.{places}f}"
                apart = f"{metric['difference']:+.{places}f} ± {_half(metric):.{places}f}"
            share = "" if kept is None else f"{100 * kept:.0f} %"
            table.append([name, shown, "" if metric is own[0][1] else apart, share])
        console.table(
            f"{protocol['name']}: {protocol['num']} for each of {protocol['seeds']} report seeds",
            ["model", "value", "minus base (95 %)", "gain kept"],
            table,
        )
    loss, base = report["protocols"][0]["name"], rows[0]["metrics"]
    if spans := [metric for metric in base if metric.startswith(f"{loss} ")]:
        console.table(
            "Loss by range of timesteps, change against the base in %",
            ["model", *(span.removeprefix(f"{loss} ") for span in spans)],
            [[row["name"],
              *(f"{100 * row['metrics'][span]['difference'] / base[span]['value']:+.2f}"
                for span in spans)]
             for row in rows[1:] if row["metrics"][loss]["value"] is not None],
        )  # fmt: skip


def _half(metric: dict[str, Any]) -> float:
    """Half the width of the interval, 0 where there is none."""
    low, high = metric["interval"]
    return 0.0 if low is None else (high - low) / 2
