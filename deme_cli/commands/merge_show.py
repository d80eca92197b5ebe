"""What `deme merge` shows: the trials of a search, a merged file, one that was built again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api import showing
from deme_cli.api.showing import ShownSearch
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.api.merge_job import MergeResult
    from deme_cli.api.showing import Trial


def show_search(path: Path, *, as_json: bool) -> None:
    """Print the trials of a search, and the best so far."""
    found = showing.show_search(path)
    names, labels = found.objectives, found.document.labels
    console.note(
        f"{found.journal}: search {found.document.search['method']} by {' > '.join(names)}, "
        f"{'finished' if found.is_finished else 'not finished'}: {len(found.trials)} trials, "
        f"{found.num_running} running"
    )
    trials = [_document(trial, labels) for trial in found.trials]
    if found.picture is None or found.best is None:
        console.result_paths([], as_json=as_json, trials=trials, finished=False)
        return
    for rung, name in enumerate(names):
        _show_rung(found, rung, name)
    console.result_paths(
        [found.picture], as_json=as_json, finished=found.is_finished,
        best=_document(found.best, labels), trials=trials,
    )  # fmt: skip


def _document(trial: Trial, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "index": trial.index, "rung": trial.rung, "name": trial.name,
        "coefficients": dict(zip(labels, trial.point, strict=True)),
        "objective": trial.objective if trial.objective < float("inf") else None,
        "seconds": round(trial.seconds, 3),
    }  # fmt: skip


def _show_rung(found: ShownSearch, rung: int, name: str) -> None:
    """The ten best of a rung; where groups differ, with the mean over groups for each expert."""
    count, best = sum(trial.rung == rung for trial in found.trials), found.best_of_rung(rung)
    if not best:
        if count:
            console.note(f"{name}: none of {count} trials is finite")
        return
    document = found.document
    groups = len(document.search["groups"])
    suffix = f" {document.search['groups'][0]}"
    experts = [
        label.removesuffix(suffix) for label in document.labels[: len(document.labels) // groups]
    ]
    rows = [
        [f"{t.index + 1} {t.name}".strip(),
         *(f"{sum(t.point[i :: len(experts)]) / groups:.3g}" for i in range(len(experts))),
         f"{t.objective:.6g}", f"{t.seconds:.1f}"]
        for t in best[:10]
    ]  # fmt: skip
    what = "mean w" if groups > 1 else "w"
    console.table(
        f"{name}: the best of {count}",
        ["trial", *(f"{what} {expert}" for expert in experts), name, "seconds"],
        rows,
    )


def replay_merge(
    merged: Path, output: Path | None, parents: list[Path], base: Path | None, run: RunFile, *,
    force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build `merged` again, and say that it is the same."""
    from deme_cli.api import replaying

    built = replaying.replay(merged, output, parents=parents, base=base, run=run, force=force)
    console.note(f"{built.path}: equal to {merged}, fingerprint {built.record.fingerprint[:12]}")
    console.result_paths(
        [built.path], as_json=as_json, path=str(built.path),
        fingerprint=built.record.fingerprint, coefficients=built.record.coefficients,
    )  # fmt: skip


def tell(merged: MergeResult, *, as_json: bool) -> None:
    """The merged file, what it was made of, and the files beside it."""
    record, search = merged.record, merged.record.search
    what = "coefficient (other tensors)" if record.coefficients_for else "coefficient"
    rows = sorted(zip(record.parents, record.coefficients, strict=True), key=_range_of)
    console.table(
        f"Merged into {merged.path} ({record.method})",
        ["timesteps", what, "from"],
        [
            [":".join(map(str, parent["range"])), f"{coefficient:.4g}", parent["path"]]
            for parent, coefficient in rows
        ],
    )
    console.result_paths(
        [merged.path, *merged.files],
        as_json=as_json,
        path=str(merged.path),
        fingerprint=record.fingerprint,
        parents=record.parents,
        method=record.method,
        coefficients=record.coefficients,
        coefficients_for=record.coefficients_for,
        objective=search["best"] if search else None,
        evaluations=search["evaluations"] if search else 0,
        search=search,
        report=record.report,
    )


def _range_of(row: tuple[dict[str, Any], float]) -> list[int]:
    return row[0]["range"]
