"""What may be said from the figures of a comparison, in sentences: nothing they do not show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from deme_cli.comparison.figures import beats, is_partial, search_of, winner
from deme_cli.comparison.results import Column, Comparison, RowResult

UNLIKE_FLOPS = 1.1  # largest over least FLOPs from which equal updates are called unlike costs


def readings(comparison: Comparison) -> list[str]:
    """Sentences that the figures allow, for all columns, then on what the rows cost."""
    rows = [row for row in comparison.rows if row.results]
    lines = [
        line
        for column in comparison.columns
        for line in (_best(rows, column), _sides(rows, column), *_merged(rows, column))
        if line
    ]
    return [*lines, *_chosen(rows), *_partial(rows), *_lone(rows), *_unlike_costs(rows)]


def _best(rows: Sequence[RowResult], column: Column) -> str:
    """Which row is best, and which are not told apart from it."""
    found = winner(rows, column)
    if found is None or len(rows) < 2:
        return ""
    if found.not_beaten:
        names = ", ".join(row.name for row in found.not_beaten)
        return f"{column.title}: best is {found.best.name}; not told apart from it: {names}"
    return f"{column.title}: best is {found.best.name}, told apart from every other row"


def _sides(rows: Sequence[RowResult], column: Column) -> str:
    """Whether one finetuned network beats all that was decoupled, or the other way round."""
    sides = {
        "finetune": [row for row in rows if row.kind == "finetune"],
        "decoupled": [row for row in rows if row.kind in ("ensemble", "merged")],
    }
    found = winner(sides["finetune"] + sides["decoupled"], column)
    if found is None or not all(sides.values()):
        return ""
    best, is_baseline = found.best, found.best.kind == "finetune"
    name = best.name if best.kind in best.name else f"{best.name} ({best.kind})"
    against = "ensemble and merged row" if is_baseline else "finetune row"
    other = sides["decoupled" if is_baseline else "finetune"]
    unclear = ", ".join(row.name for row in other if row in found.not_beaten)
    if unclear:
        return (
            f"{column.title}: {name} is the best of the rows that train, but "
            f"does not beat every {against}: not told apart from {unclear}"
        )
    claim = f"{name} beats every {against}"
    return f"{column.title}: {'a baseline beats DeMe: ' if is_baseline else ''}{claim}"


def _merged(rows: Sequence[RowResult], column: Column) -> Iterator[str]:
    """Which merged rows, each one network as a finetune row is, do not beat every finetune row."""
    baselines = [row for row in rows if row.kind == "finetune" and row.results]
    for row in rows:
        unbeaten = [other.name for other in baselines if not beats(row, other, column)]
        if row.kind == "merged" and unbeaten:
            names = ", ".join(unbeaten)
            yield f"{column.title}: {row.name} does not beat {names}"


def _chosen(rows: Sequence[RowResult]) -> Iterator[str]:
    """Which rows had a choice among candidates that the others had not."""
    searched = [(row.name, cost) for row in rows if (cost := search_of(row))]
    for (objective, count), group in groupby(
        searched, key=lambda one: (one[1].objective, one[1].evaluations)
    ):
        names = ", ".join(name for name, _ in group)
        yield (
            f"coefficients chosen by {objective} among {count} candidates, on seeds and images "
            f"other than these; rows without a search had no such choice: {names}"
        )


def _partial(rows: Sequence[RowResult]) -> Iterator[str]:
    """Which rows stand on fewer seeds than planned."""
    names = ", ".join(row.name for row in rows if is_partial(row))
    if names and all(is_partial(row) for row in rows):
        yield "no row has all its seeds yet: what is best may change"
    elif names:
        yield f"not all seeds of these rows are measured, so they are not called best: {names}"


def _lone(rows: Sequence[RowResult]) -> Iterator[str]:
    """Which rows show nothing of how training varies."""
    lone = [row.name for row in rows if len(row.results) == 1 and row.results[0].seed is not None]
    if lone:
        yield f"trained from one seed, so a difference may be chance of training: {', '.join(lone)}"


def _unlike_costs(rows: Sequence[RowResult]) -> Iterator[str]:
    """Where rows of equal updates differ in FLOPs, and whether rows differ in updates."""
    trained = sorted((row for row in rows if row.updates), key=lambda row: row.updates)
    budgets = [list(group) for _, group in groupby(trained, key=lambda row: row.updates)]
    for group in budgets:
        counted = [row for row in group if row.flops > 0]
        least = min(counted, key=lambda row: row.flops, default=None)
        most = max(counted, key=lambda row: row.flops, default=None)
        if least and most and most.flops > UNLIKE_FLOPS * least.flops:
            yield (
                f"equal updates are not equal compute: in {least.updates} updates {most.name} "
                f"takes {most.flops / least.flops:.2g} times the FLOPs of {least.name}"
            )
    if len(budgets) > 1:
        yield (
            f"rows differ in updates: from {trained[0].updates} ({trained[0].name}) "
            f"to {trained[-1].updates} ({trained[-1].name})"
        )
