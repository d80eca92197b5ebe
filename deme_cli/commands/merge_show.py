"""What `deme merge` shows: the trials of a search, a merged file, one that was built again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.errors import MissingError
from deme_cli.outputs import write_whole
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.api.merge_job import MergeResult
    from deme_cli.merging.search.journal_file import JournalDocument
    from deme_cli.merging.search.trials import Trial


def show_search(path: Path, *, as_json: bool) -> None:
    """Print trials, the best so far and what it depends on; draw them beside the journal.

    path: the journal, or the merged file that lies beside it.
    """
    from deme_cli.merging.search.importance import importances
    from deme_cli.merging.search.journal import asked_trials
    from deme_cli.merging.search.journal_file import read_journal
    from deme_cli.merging.search.trials import trials_of
    from deme_cli.merging.search.trials_figure import best_of, draw_trials

    journal = _journal_of(path)
    document = read_journal(journal)
    asked = asked_trials(document.trials, document.labels)
    trials = trials_of(asked)
    names = [objective["name"] for objective in document.search["objectives"]]
    running = len(asked) - len(trials)
    state = "finished" if document.merged else "not finished"
    console.note(
        f"{journal}: search {document.search['method']} by {' > '.join(names)}, {state}: "
        f"{len(trials)} trials, {running} running"
    )
    if not any(math.isfinite(trial.objective) for trial in trials):
        shown = [_document(trial, document.labels) for trial in trials]
        console.result_paths([], as_json=as_json, trials=shown, finished=False)
        return
    shares = importances(trials, document.labels)
    for rung, name in enumerate(names):
        _show_rung(name, [t for t in trials if t.rung == rung], document)
    if shares:
        console.table(
            "What the objective depends on (PED-ANOVA)",
            ["coefficient", "importance"],
            [[label, f"{share:.3f}"] for label, share in list(shares.items())[:10]],
        )
    picture = journal.with_suffix(".png")
    write_whole(
        picture, [draw_trials(trials, document.labels, objectives=names, importances=shares)]
    )
    console.result_paths(
        [picture], as_json=as_json, finished=document.merged is not None, importances=shares,
        best=_document(best_of(trials), document.labels),
        trials=[_document(trial, document.labels) for trial in trials],
    )  # fmt: skip


def _journal_of(path: Path) -> Path:
    if path.suffix != ".safetensors":
        return path
    journal = path.with_name(f"{path.stem}.trials.jsonl")
    if not journal.is_file():
        raise MissingError(f"{path}: no journal of its search beside it ({journal.name})")
    return journal


def _document(trial: Trial, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "index": trial.index, "rung": trial.rung, "name": trial.name,
        "coefficients": dict(zip(labels, trial.point, strict=True)),
        "objective": trial.objective if trial.objective < float("inf") else None,
        "seconds": round(trial.seconds, 3),
    }  # fmt: skip


def _show_rung(name: str, trials: Sequence[Trial], document: JournalDocument) -> None:
    """The ten best of a rung; where groups differ, with the mean over groups for each expert."""
    from deme_cli.errors import NumericsError
    from deme_cli.merging.search.trials import ranked

    try:
        best = ranked(trials)[:10]
    except NumericsError:
        if trials:
            console.note(f"{name}: none of {len(trials)} trials is finite")
        return
    groups = len(document.search["groups"])
    suffix = f" {document.search['groups'][0]}"
    experts = [
        label.removesuffix(suffix) for label in document.labels[: len(document.labels) // groups]
    ]
    rows = [
        [f"{t.index + 1} {t.name}".strip(),
         *(f"{sum(t.point[i :: len(experts)]) / groups:.3g}" for i in range(len(experts))),
         f"{t.objective:.6g}", f"{t.seconds:.1f}"]
        for t in best
    ]  # fmt: skip
    what = "mean w" if groups > 1 else "w"
    console.table(
        f"{name}: the best of {len(trials)}",
        ["trial", *(f"{what} {expert}" for expert in experts), name, "seconds"],
        rows,
    )


def replay_merge(
    merged: Path, output: Path | None, parents: list[Path], base: Path | None, run: RunFile,
    device: str, *, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build `merged` again, and say that it is the same."""
    from deme_cli.api import replaying

    built = replaying.replay(
        merged, output, parents=parents, base=base, run=run, device=device, force=force
    )
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
