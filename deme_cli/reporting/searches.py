"""How merged models came about: coefficients, the search of them, what was reported afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_cli.artifacts import MergedRecord
from deme_cli.console import digits_for, fixed, number, plain
from deme_cli.errors import ArtifactError
from deme_cli.reporting.folder import JOURNAL, Artifact, Folder, read_text
from deme_cli.reporting.measures import Difference, Measure
from deme_cli.reporting.tables import (
    Card,
    Cell,
    Field,
    Table,
    as_text,
    flatten,
    metric_cells,
    plain_table,
    public_name,
)

SEARCH_PICTURES = (".search.png", ".coefficients.png", ".trials.png")
_CANDIDATES = {"mean": "1/N each"}  # of the names in a record
_MOST_GROUPS = 60  # rows of a table of coefficients by block or layer
_CREATED, _STATE, _COMPLETE, _FAILED = 4, 6, 1, 3  # optuna's codes in a journal


@dataclass(frozen=True)
class Merge:
    """One merged model, or a search that has none yet."""

    name: str
    sentences: list[str]
    tables: list[Table] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # names of PNG files in the folder


def merges(folder: Folder) -> list[Merge]:
    """Every merged model of the folder with its search, then searches that are not finished."""
    journals = {path.name.removesuffix(JOURNAL): path for path in folder.journals}
    found = []
    for artifact, record in folder.of(MergedRecord):
        try:
            found.append(_merge(folder, artifact, record, journals.pop(artifact.stem, None)))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            folder.give_up(artifact.name, ArtifactError(f"its record is damaged ({error!r})"))
    for stem, path in journals.items():
        if told := _journal(folder, path):
            text = f"The search of {stem} is not finished: {told}."
            found.append(Merge(path.name, [text], pictures=_pictures(folder, stem)))
    return found


def _merge(folder: Folder, artifact: Artifact, record: MergedRecord, journal: Path | None) -> Merge:
    sentences = [_made(record)]
    tables = [_coefficients(record)]
    if record.coefficients_for:
        tables.append(_finer(record))
    cards = []
    if settings := dict(flatten(record.settings)):
        cards.append(_card(f"Settings of the method {record.method}", settings))
    if record.search:
        sentences += _search(record.search)
        tables += list(_rungs(record.search))
        cards.append(_card("Search", dict(flatten(record.search))))
    if journal is not None and (told := _journal(folder, journal)):
        sentences.append(f"{journal.name}: {told}.")
    if record.report:
        tables += list(_report(record.report))
        besides = {key: value for key, value in record.report.items() if key != "rows"}
        cards.append(_card("Report", dict(flatten(besides))))
    return Merge(artifact.name, sentences, tables, cards, _pictures(folder, artifact.stem))


def _pictures(folder: Folder, stem: str) -> list[str]:
    return [name for end in SEARCH_PICTURES if (name := f"{stem}{end}") in folder.pictures]


def _card(title: str, fields: Mapping[str, str]) -> Card:
    return Card(title, [Field(name, text) for name, text in fields.items()])


def _made(record: MergedRecord) -> str:
    method = "" if record.method == "linear" else f", by the method {record.method}"
    return f"One network of {len(record.parents)} parents on the base {record.base[:12]}{method}."


def _span(parent: Mapping[str, Any]) -> str:
    start, stop = parent["range"]
    return f"{start}:{stop}"


def _coefficients(record: MergedRecord) -> Table:
    what = "coefficient (other tensors)" if record.coefficients_for else "coefficient"
    rows = [
        [public_name(str(parent["path"])), _span(parent), plain(number(w)), str(parent["kind"]),
         str(parent["fingerprint"])[:12]]
        for parent, w in zip(record.parents, record.coefficients, strict=True)
    ]  # fmt: skip
    columns = ["parent", "timesteps", what, "kind", "fingerprint"]
    return plain_table("Coefficients of the task vectors (Eq. 8)", columns, rows, words=(3, 4))


def _finer(record: MergedRecord) -> Table:
    """The coefficients by pattern, one column per parent."""
    items = list(record.coefficients_for.items())
    left = len(items) - _MOST_GROUPS
    rows = [[glob, *(plain(number(w)) for w in ws)] for glob, ws in items[:_MOST_GROUPS]]
    more = f"; {left} more in the artifact" if left > 0 else ""
    columns = ["tensors", *(_span(parent) for parent in record.parents)]
    return plain_table(f"Coefficients by pattern, the first that matches{more}", columns, rows)


def _search(search: Mapping[str, Any]) -> Iterator[str]:
    """How it searched and what it found, on its own seeds."""
    if search["method"] == "post-hoc EMA":
        yield (
            f"The coefficients make an average of relative length {as_text(search['ema_length'])} "
            f"from snapshots (post-hoc EMA)."
        )
        return
    values = {name: value for name, value in search["values"].items() if value is not None}
    known = [number(value) for value in values.values()]
    spread = (max(known) - min(known)) / 10 if known else 0.0
    shown = [
        f"{_CANDIDATES.get(name, name)} {fixed(number(value), digits_for(spread, number(value)))}"
        for name, value in values.items()
    ]
    seconds = f" in {plain(number(search['seconds']))} s" if "seconds" in search else ""
    yield (
        f"Search {search['method']} by {search['objective']}: {int(search['evaluations']):,} "
        f"evaluations{seconds}. It saw {', '.join(shown) or 'nothing finite'}: the best is chosen "
        f"by these very numbers, so judge on others."
    )


def _rungs(search: Mapping[str, Any]) -> Iterator[Table]:
    """The ladder of objectives, where there is one."""
    rungs = search.get("rungs") or []
    if len(rungs) < 2:
        return
    rows = [
        [str(rung["objective"]), plain(int(rung["num"])), plain(int(rung["evaluations"])),
         plain(int(rung["keep"])),
         "" if rung["rho_to_next"] is None else f"{number(rung['rho_to_next']):.2f}"]
        for rung in rungs
    ]  # fmt: skip
    columns = ["objective", "draws or images", "evaluations", "kept", "rank correlation to next"]
    yield plain_table("Ladder of the search", columns, rows)


def _report(report: Mapping[str, Any]) -> Iterator[Table]:
    """One table per metric: each model's value, its difference to the base, the gain it kept."""
    rows = report["rows"]
    metrics = dict.fromkeys(metric for row in rows for metric in row["metrics"])
    for metric in metrics:
        if " " in metric:  # of a range of timesteps
            continue
        measures = list(_report_measures(rows, metric))
        lines = metric_cells(metric, measures)
        cells = []
        for row in rows:
            if (figure := row["metrics"].get(metric)) is None:
                continue
            kept = figure.get("gain_kept")
            gain = "" if kept is None else f"{100 * number(kept):.0f} %".replace("-", "\u2212")
            cells.append([Cell(str(row["name"])), *lines[str(row["name"])], Cell(gain)])
        yield Table(
            f"{metric}, on seeds and images other than the search's (interval by bootstrap)",
            ["model", metric, "minus base [95 %]", "95 % interval", "gain of the ensemble kept"],
            cells,
        )


def _report_measures(rows: Sequence[Mapping[str, Any]], metric: str) -> Iterator[Measure]:
    base = str(rows[0]["name"])
    for index, row in enumerate(rows):
        if (figure := row["metrics"].get(metric)) is None:
            continue
        low, high = map(number, figure["interval"])
        mean = number(figure["difference"])
        difference = Difference(base, mean, float("nan"), low, high) if index else None
        value = number(figure["value"])
        name = str(row["name"])
        yield Measure(name, name, value, None, 0, len(figure["values"]), difference)


def _journal(folder: Folder, path: Path) -> str:
    """How many trials a journal holds, counted without taking its lock or changing it."""
    begun = complete = failed = 0
    try:
        lines = read_text(path).splitlines()
    except (ArtifactError, OSError) as error:
        folder.give_up(path.name, error)
        return ""
    for line in lines:
        try:
            entry = json.loads(line)
            code, state = entry["op_code"], entry.get("state")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # the line that is being written, or that a killed process left torn
        begun += code == _CREATED
        complete += state == _COMPLETE and code in (_CREATED, _STATE)
        failed += state == _FAILED and code in (_CREATED, _STATE)
    if not begun:
        folder.give_up(path.name, ArtifactError("holds no trials of a search"))
        return ""
    broken = f", {failed} given up or not finite" if failed else ""
    return f"{begun:,} trials begun, {complete:,} finished{broken}"
