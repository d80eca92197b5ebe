"""A run folder as one HTML page: tables, protocols, curves, searches, figures, samples, artifacts.

Everything comes from the JSON files and the headers of artifacts that lie in the folder itself, and
the pictures are those that commands have written, but for the curves of training. The page holds
all of it inside: no script, no network, no date, so the same folder makes the same bytes. What
cannot be read is told with its reason and never ends the work. The template escapes everything.
(Not called report.py, which would hide the function of that name in `import deme_cli`.) No torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from deme_cli.analysis.figure import color_of, open_axis, render
from deme_cli.analysis.settings import ANALYSES
from deme_cli.artifacts import KINDS, BaseRecord, ExpertRecord, MergedRecord, SamplesRecord
from deme_cli.console import decimals, fixed, plain, signed, size_of
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.evaluation.protocols import WHO_AND_WHENCE
from deme_cli.files import require_output, write_whole
from deme_cli.run_folder import (
    CARD_NAME,
    DAMAGED,
    JOURNAL,
    METRICS,
    Folder,
    embedded,
    is_current,
    open_folder,
    picture_of,
    text_of,
)

REPORT_NAME = "report.html"
SECTIONS = ("tables", "curves", "searches", "figures", "samples", "pictures", "artifacts")
_HIGHER = ("clip_score", "accuracy")
_MOST_PICTURES, _LONGEST, _SMOOTH = 12, 2000, 20
# Control characters, lone surrogates and noncharacters, which HTML has no place for.
_ENDS = "".join(chr(p + end) for p in range(0, 0x110000, 0x10000) for end in (0xFFFE, 0xFFFF))
_UNPRINTABLE = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_ENDS}]")
Json = Mapping[str, Any]
Card = tuple[str, list[tuple[str, str, bool]]]  # a title; fields: name, text, whether it differs
Columns = tuple[list[str], list[list[tuple[str, str]]]]  # headings; cells (text, tone) of each row


@dataclass(frozen=True)
class WrittenReport:
    """The page as a file, how much each section holds, and what a reader misses.

    missing: what is not there and the command that makes it.   unread: files that are there and not
    shown, with the reason.
    """

    path: Path
    num_bytes: int
    counts: dict[str, int]
    missing: list[tuple[str, str]]
    unread: dict[str, str]


def report(
    folder: Path = Path("."), *, output: Path | None = None, title: str | None = None,
    force: bool = False,
) -> WrittenReport:  # fmt: skip
    """Make one HTML file of a run folder.

    output: None for report.html in the folder.   title: None for the folder's name.   Raises
    ConfigError, MissingError for a folder that is not there or has nothing of deme's.
    """
    from jinja2 import Environment, StrictUndefined

    target = output or folder / REPORT_NAME
    if target.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output {target}: expected a name that ends in .html")
    found = open_folder(folder)
    require_output(target, force=force)
    page = _page(found)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda v: _UNPRINTABLE.sub("\ufffd", v) if type(v) is str else v,
    )  # fmt: skip
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text("utf-8"))
    content = template.render(title=title or folder.resolve().name or "/", **page).encode()
    write_whole(target, [content])
    counts = {name: len(page[name]) for name in SECTIONS}
    return WrittenReport(target, len(content), counts, page["missing"], found.unread)


def _page(folder: Folder) -> dict[str, Any]:
    tables, searches = [], []
    for name in sorted(folder.documents, key=lambda n: ("columns" in folder.documents[n], n)):
        document = folder.documents[name]
        if is_current(document) and "kind" not in document and "rows" in document:
            with folder.noting(name):
                read = _comparison if "columns" in document else _evaluation
                tables.append(read(name, document))
    for path, record in folder.of(MergedRecord):
        with folder.noting(path.name):
            searches.append(_merge(folder, path, record))
    drawn, curves = _curves(folder)
    figures = [figure for _, figure in sorted(_analyses(folder), key=lambda one: one[0])]
    samples = list(_samples(folder))
    shown = {one["picture"]["name"] for one in (*figures, *samples, *searches) if one["picture"]}
    left = [n for n in folder.files if n.endswith(".png") and n not in shown]
    left.sort(key=lambda name: (name not in ("compare.png", "demo.png"), name))
    pictures = [one for name in left[:_MOST_PICTURES] if (one := picture_of(folder, name))]
    return {
        "tables": tables, "curves": curves, "curve_picture": drawn, "searches": searches,
        "figures": figures, "samples": samples, "pictures": pictures,
        "artifacts": _artifacts(folder), "unread": folder.unread,
        "missing": _missing(folder, tables, figures, samples) if folder.artifacts else [],
    }  # fmt: skip


def _number(value: Any) -> float:
    """A number of a JSON document; null is nan."""
    return math.nan if value is None else float(value)


def _metric(title: str, metric: str, figures: Sequence[Json | None]) -> Columns:
    """The columns of one metric.

    figures: value, sd, and difference (mean, sd, interval) of each row; None where it has none.
    """
    sign, some = -1 if metric in _HIGHER else 1, [one or {} for one in figures]
    values, sds = ([_number(one.get(name)) for one in some] for name in ("value", "sd"))
    finite, spread = ([*filter(math.isfinite, numbers)] for numbers in (values, sds))
    best = min(finite, key=lambda value: sign * value) if len(finite) > 1 else None
    digits = decimals(spread or finite, 2 if spread else 4)
    others = [one.get("difference") for one in some]
    spread = [_number(one["sd"]) for one in others if one and one.get("sd") is not None]
    places = decimals(spread, 2) if spread else digits
    cells = []
    for one, value, sd, other in zip(some, values, sds, others, strict=True):
        told = fixed(value, digits) if one else ""
        told += f" ± {fixed(sd, digits)}{one.get('mark', '')}" if math.isfinite(sd) else ""
        line = [(told, "best" if value == best else "")]
        if other:
            mean, low, high = map(_number, (other["mean"], *other["interval"]))
            side = "" if low <= 0 <= high else "better" if sign * mean < 0 else "worse"
            ends = f"[{signed(low, places)}, {signed(high, places)}]"
            line.append((f"{signed(mean, places)} {ends}", side))
        elif any(others):
            line.append(("", ""))
        cells.append(line)
    arrow = "\N{DOWNWARDS ARROW}" if sign > 0 else "\N{UPWARDS ARROW}"
    return [f"{title} {arrow}"] + ["minus the first [95 %]"] * any(others), cells


def _table(
    caption: str, names: Sequence[tuple[str, str]], columns: Sequence[Columns]
) -> dict[str, Any]:
    """Rows of cells (text, tone); of the first one the tone is a note below the name."""
    heads = ["row", *(head for some, _ in columns for head in some)]
    rows = [[name, *(cell for _, cells in columns for cell in cells[i])]
            for i, name in enumerate(names)]  # fmt: skip
    return {"caption": caption, "columns": heads, "rows": rows}


def _evaluation(name: str, document: Json) -> dict[str, Any]:
    rows = document["rows"]
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["metrics"]))
    if not metrics:
        raise ValueError("it has no figures")
    columns = [_metric(m, m, [row["metrics"].get(m) for row in rows]) for m in metrics]
    first = [next(iter(row["metrics"].values()), None) for row in rows]
    counts = [f"{one['n']:,} x {one.get('repeats', 1)}" if one else "" for one in first]
    columns.append((["images x repeats"], [[(text, "")] for text in counts]))
    names = [(str(row["name"]), str(row["kind"])) for row in rows]
    cards = _cards([(str(row["name"]), row.get("protocol") or {}) for row in rows])
    return {"title": f"Evaluation, {name}", "tables": [_table(name, names, columns)],
            "notes": [], "cards": cards}  # fmt: skip


def _comparison(name: str, document: Json) -> dict[str, Any]:
    """The table of `deme compare`, and apart from it the published figures."""
    rows, columns = document["rows"], []
    for column in document["columns"]:
        cells = [row["metrics"].get(column["title"]) for row in rows]
        figures = [
            cell and {**cell, "value": cell["mean"], "mark": "\N{DAGGER}" * (cell["sd"] is None),
                      "sd": cell["repeats_sd"] if cell["sd"] is None else cell["sd"]}
            for cell in cells
        ]  # fmt: skip
        columns.append(_metric(str(column["title"]), str(column["metric"]), figures))
    nums = [sum(one["seed"] is not None for one in row["results"]) for row in rows]
    costs = [[(str(num), ""), (f"{int(row['updates'] or 0):,}", "")] if num else [("", "")] * 2
             for num, row in zip(nums, rows, strict=True)]  # fmt: skip
    columns.append((["training seeds", "updates"], costs))
    names = [
        (str(row["name"]), "; ".join([str(row["kind"]), *map(_public, row.get("failures") or [])]))
        for row in rows
    ]
    tables = [_table(f"Measured rows of {name}", names, columns)]
    if published := document.get("published"):
        cited = [(str(row), "") for row in published["rows"]]
        numbers = [[("" if v is None else plain(v), "") for v in line]
                   for line in published["rows"].values()]  # fmt: skip
        caption = f"Published, not measured here: {published['source']}"
        tables.append(_table(caption, cited, [(list(map(str, published["columns"])), numbers)]))
    cards = [(str(measure) or "every row", card) for measure, card in document["cards"].items()]
    notes = [*map(str, document["reading"]), *map(str, document["protocol"])]
    return {"title": str(document["title"]), "tables": tables, "notes": notes,
            "cards": _cards(cards)}  # fmt: skip


def _cards(cards: Sequence[tuple[str, Json]]) -> list[Card]:
    """A card per row; marked are fields in which rows differ, but for who drew and from where."""
    flat = [(title, dict(_flat(card))) for title, card in cards]
    names = dict.fromkeys(name for _, fields in flat for name in fields)
    seen = {name: {fields.get(name) for _, fields in flat} for name in names}
    differs = [n for n, texts in seen.items()
               if len(texts) > 1 and n.split(".")[0] not in WHO_AND_WHENCE]  # fmt: skip
    return [
        (title, [(name, fields.get(name, "absent"), name in differs) for name in names])
        for title, fields in flat
        if fields
    ]


def _flat(card: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Fields of a card as texts, those of tables in it under `table.field` or `table.1.field`."""
    for name, value in card.items():
        if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            value = dict(enumerate(value[:64], start=1))
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = _shown(value)
            yield f"{prefix}{name}", text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_shown(one)}" for key, one in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value)) or "none"
    if value is None or type(value) is bool:
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:.6g}" if type(value) is float else _public(str(value))


def _public(text: str) -> str:
    """Of an absolute path the last part, for a page is shared; anything else as it is."""
    scheme = "local-dir:" if text.startswith("local-dir:") else ""  # of CLIP's weights
    place = text.removeprefix(scheme)
    kinds = PurePosixPath, PureWindowsPath
    if not place.startswith("~") and not any(kind(place).is_absolute() for kind in kinds):
        return text
    return scheme + (PureWindowsPath(place).name or place)  # which knows both separators


def _analyses(folder: Folder) -> Iterator[tuple[tuple[int, str], dict[str, Any]]]:
    """A figure for each document of an analysis, in the order of the paper."""
    for name, document in folder.documents.items():
        kind, protocol = document.get("kind"), document.get("protocol")
        if not isinstance(kind, str) or "schema_version" not in document:
            continue
        if not is_current(document):
            folder.unread[name] = f"schema_version {document['schema_version']!r}, expected 1"
            continue
        place = [*ANALYSES, kind].index(kind)
        yield (place, name), {
            "title": kind.replace("-", " ").capitalize(), "text": str(document.get("reading", "")),
            "picture": picture_of(folder, f"{name.removesuffix('.json')}.png"), "name": name,
            "cards": _cards([("Protocol", protocol if isinstance(protocol, Mapping) else {})]),
        }  # fmt: skip


def _samples(folder: Folder) -> Iterator[dict[str, Any]]:
    """A preview for each artifact of samples and each folder of images."""
    found = [(path, r.protocol, r.prompts or r.classes) for path, r in folder.of(SamplesRecord)]
    for path in folder.image_folders:
        with folder.noting(f"{path.name}/{CARD_NAME}"):
            protocol = dict(json.loads(text_of(path / CARD_NAME))["protocol"])
            found.append((path, protocol, None))
    for path, protocol, prompts in found:
        told, stem = dict(_flat(protocol)), path.name.removesuffix(".safetensors")
        num, sampler, steps, seed = (told.get(n, "?") for n in ("num", "sampler", "steps", "seed"))
        yield {
            "title": stem, "name": path.name, "picture": picture_of(folder, f"{stem}.png"),
            "text": f"{num} images: {sampler}, {steps} steps, seed {seed}",
            "prompts": [str(prompt) for prompt in (prompts or [])[:64]],
            "cards": _cards([("Protocol", protocol)]),
        }  # fmt: skip


def _merge(folder: Folder, path: Path, record: MergedRecord) -> dict[str, Any]:
    names = [
        (_public(str(one["path"])), ":".join(map(str, one["range"]))) for one in record.parents
    ]
    values = [[(plain(_number(w)), "")] for w in record.coefficients]
    tables = [_table("Coefficients of the task vectors (Eq. 8)", names, [(["w"], values)])]
    tables += _reported(record.report) if record.report else []
    search, text = record.search or {}, f"{record.method} merge of {len(names)}"
    if search:
        text += f", coefficients by {search.get('method')} search"
    if "evaluations" in search:
        text += f" of {search.get('objective')}: {int(search['evaluations']):,} evaluations"
    if (journal := f"{path.stem}{JOURNAL}") in folder.files:
        text += f"; trials in {journal}"
    told = {"Search": {k: v for k, v in search.items() if k != "trials"},
            "Settings": record.settings,
            "Coefficients by pattern, the first that matches": record.coefficients_for}  # fmt: skip
    return {
        "name": path.name, "text": text, "tables": tables,
        "picture": picture_of(folder, f"{path.stem}.search.png"),
        "cards": [card for one in told.items() for card in _cards([one])],
    }  # fmt: skip


def _reported(report: Json) -> Iterator[dict[str, Any]]:
    """A table per metric of what was measured on other seeds and images than the search's."""
    rows = report["rows"]
    for metric in dict.fromkeys(metric for row in rows for metric in row["metrics"]):
        if " " in metric:  # of a range of timesteps
            continue
        figures = [row["metrics"].get(metric) for row in rows]
        shown = [
            one and {"value": one["value"], "difference": i > 0 and
                     {"mean": one["difference"], "interval": one["interval"]}}
            for i, one in enumerate(figures)
        ]  # fmt: skip
        gains = [(one or {}).get("gain_kept") for one in figures]
        kept = [[("" if g is None else f"{100 * _number(g):.0f} %", "")] for g in gains]
        columns = [_metric(metric, metric, shown), (["gain of the ensemble kept"], kept)]
        caption = f"{metric}, on seeds and images other than the search's (interval by bootstrap)"
        yield _table(caption, [(str(row["name"]), "") for row in rows], columns)


def _curves(folder: Folder) -> tuple[dict[str, Any] | None, list[str]]:
    """The curves of training drawn in one picture, a panel per run, and the names of the runs."""
    import numpy as np

    curves: dict[str, np.ndarray] = {}  # (records, 3): update, loss, held-out loss
    for name in [name for name in folder.files if name.endswith(METRICS)]:
        with folder.noting(name):
            records: dict[int, list[float]] = {}  # one that was logged twice counts as logged last
            for text in text_of(folder.files[name]).splitlines():
                with suppress(*DAMAGED):  # torn by a kill
                    record = json.loads(text)
                    numbers = (record["step"], record.get("loss"), record.get("held_out"))
                    records[int(record["step"])] = list(map(_number, numbers))
            if not records:
                raise ArtifactError(f"{name}: holds no record of training")
            curves[name.removesuffix(METRICS)] = np.array(sorted(records.values()))
    if not curves:
        return None, []
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)

    def draw(figure: Any) -> None:
        axes = figure.subplots(lines, columns, squeeze=False).flat
        for index, (axis, (name, curve)) in enumerate(zip(axes, curves.items(), strict=False)):
            color, (steps, losses, held_out) = color_of(index), curve.T
            axis.plot(steps, losses, color=color, linewidth=0.7, alpha=0.45)
            parts = np.array_split(curve, min(_SMOOTH, len(curve)))
            x, y, _ = np.array([part.mean(axis=0) for part in parts]).T
            axis.plot(x, y, color=color, linewidth=1.8, label="training loss, mean")
            if np.isfinite(held_out).any():
                axis.plot(steps, held_out, "o", color="0.2", markersize=3, label="held-out loss")
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("update")
            open_axis(axis)
        axes[0].legend(frameon=False, fontsize=7.5)
        for axis in axes[len(curves) :]:
            axis.set_axis_off()

    size = (3.6 * columns + 0.4, 2.5 * lines + 0.7)
    png = render(draw, size=size, title="Loss against the update, each run on its own scale")
    return embedded("training", png, (int(size[0] * 160), int(size[1] * 160))), list(curves)


def _artifacts(folder: Folder) -> list[list[str]]:
    names = {record.fingerprint: path.stem for path, record in reversed(folder.artifacts)}
    rows = []
    for path, record in sorted(folder.artifacts, key=lambda one: [*KINDS].index(one[1].kind)):
        marks: Any = []
        if isinstance(record, MergedRecord):
            marks = [one.get("fingerprint") for one in record.parents if isinstance(one, dict)]
        elif isinstance(record, ExpertRecord):
            marks = [getattr(record, "expert", record.base)]  # of a task vector
        elif isinstance(record, SamplesRecord):
            marks = record.protocol.get("fingerprints")
        made_of = ", ".join(names.get(str(mark), str(mark)[:12]) for mark in marks or [])
        span = str(record.timesteps) if isinstance(record, ExpertRecord) else ""
        size = size_of(path.stat().st_size)
        rows.append([path.name, record.kind, span, made_of, size, record.fingerprint[:12]])
    for one in folder.exports:
        path, mark = one.header.path, one.made_of.fingerprint if one.made_of else ""
        size = size_of(path.stat().st_size)
        rows.append(
            [path.name, f"exported: {one.foreign}", "", names.get(mark, mark[:12]), size, ""]
        )
    return rows


def _missing(
    folder: Folder, tables: Sequence[Any], figures: Sequence[Any], samples: Sequence[Any]
) -> list[tuple[str, str]]:
    """What a reader might expect and is not there, with the command that makes it."""
    there = {(record.index, record.of) for _, record in folder.of(ExpertRecord)}
    wanted = [
        (folder.of(BaseRecord), "the base", "deme split MODEL -n 4"),
        (there, "experts", "deme finetune --range all"),
        *(
            ((i, n) in there, f"expert {i} of {n}", f"deme finetune --range {i}/{n}")
            for n in sorted({n for _, n in there if n and n > 1})
            for i in range(1, min(n, 64) + 1)
        ),
        (folder.of(MergedRecord), "a merged model", "deme merge ft_*.safetensors --search grid"),
        (samples, "images", "deme sample merged.safetensors"),
        (tables, "a table", "deme eval --fid REF --repeats 3 --output eval.json"),
        (figures, "figures of why it works", "deme analyze losses"),
    ]
    return [(what, command) for found, what, command in wanted if not found]
