"""`deme merge --show` and `--replay`: what a search has tried, and a merged file built again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.errors import MissingError
from deme_cli.outputs import require_output, write_whole
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
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
    run: RunFile, merged: Path, output: Path | None, parents: Sequence[Path], base: Path | None, *,
    device: str, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build `merged` again from its parents into `output`, and say that it is the same."""
    from deme_cli.commands.merge_data import rebuild_from_data
    from deme_cli.merging.replay import replay

    target = output or merged.with_name(f"{merged.stem}.replayed.safetensors")
    require_output(target, force=force)
    rebuild = partial(rebuild_from_data, run, device)
    record = replay(merged, target, parents=parents, base=base, rebuild=rebuild)
    console.note(f"{target}: equal to {merged}, fingerprint {record.fingerprint[:12]}")
    console.result_paths(
        [target], as_json=as_json, path=str(target), fingerprint=record.fingerprint,
        coefficients=record.coefficients,
    )  # fmt: skip
