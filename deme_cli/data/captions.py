"""What the images of a source show: a caption of each, or its class. No image is read for it.

They lie with the images in the layouts of other tools:

- `metadata.jsonl`, `.csv` or `.parquet`, at the root or in any folder below it, with a column
  `file_name` relative to itself: imagefolder of `datasets`
- `dataset.json` with `labels`: StyleGAN and EDM
- `x.txt`, `x.caption`, `x.cls` or `x.json` beside `x.png`: kohya's scripts and img2dataset. Of
  kohya's folders `10_name`, training sees each image 10 times, and an image without a caption is
  called by the name.
- columns of a table: parquet, hub datasets, shards of webdataset (`txt`, and the fields of `json`)

Without any of these, the folder that an image lies in is its class. Raw values are required of
every image and cleaned. Classes whose names are whole numbers are these numbers; others are
numbered in the order of their names. Nothing here tokenizes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from deme_cli import console
from deme_cli.data.archives import exists, read_bytes
from deme_cli.data.image_source import ImageSource
from deme_cli.data.prompts import (
    TextTable,
    lines_of,
    parse_json,
    read_text,
    read_text_table,
)
from deme_cli.errors import ArtifactError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
COLUMNS = {"text": ("text", "caption", "prompt"), "class": ("label", "labels", "cls")}
JSON_FIELDS = {"text": ("caption", "text", "prompt"), "class": COLUMNS["class"]}
_BESIDE = {"text": (".txt", ".caption"), "class": (".cls",)}
_MAX_REPEATS = 100  # more is a year or a number of its own


class NoAnnotations(ArtifactError):
    """Nothing is told of the images, in any of the ways that deme knows."""


@dataclass(frozen=True)
class RawAnnotations:
    """One value per image, None where there is none; `where` they come from, for messages.

    classes: all values that a whole dataset holds, where `values` are of one split of it.
    names: of classes that the source declares, which `values` number. are_names: whether `10` is a
    name where others are words. repeats: how often training sees each image in an epoch.
    """

    values: Sequence[Any]
    where: str
    classes: Sequence[Any] = ()
    names: Sequence[str] = ()
    are_names: bool = False
    repeats: Sequence[int] = ()


@dataclass(frozen=True)
class Annotations:
    """What each image shows: `captions` or `labels` (numbers below `num_classes`), never both.

    classes: the names of the classes found, by number.
    """

    captions: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    num_classes: int | None = None
    classes: Mapping[int, str] = field(default_factory=dict)
    repeats: Sequence[int] = ()

    def fingerprint(self, images: str) -> str:
        """That of the images, joined with what they show where anything was asked for."""
        if not self.captions and not self.labels:
            return images
        shown: list[Any] = [images, self.captions, self.labels, self.num_classes]
        if self.repeats:
            shown.append(self.repeats)
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def read_captions(raw: RawAnnotations, source: str, name: Callable[[int], str]) -> Annotations:
    """A caption of every image; of a list of captions, the first. `name(i)` is image i in messages.

    Raises ArtifactError naming the first image without one, or with one that is not text.
    """
    captions = [next(iter(v), None) if isinstance(v, (list, tuple)) else v for v in raw.values]
    for index, caption in enumerate(captions):
        if caption is not None and not isinstance(caption, str):
            raise ArtifactError(
                f"{name(index)}: expected text in {raw.where}, found {type(caption).__name__}; "
                f"name the column of the captions"
            )
    cleaned = tuple((caption or "").strip() for caption in captions)
    _require_all([bool(caption) for caption in cleaned], "captions", raw.where, source, name)
    return Annotations(cleaned, repeats=raw.repeats)


def read_labels(raw: RawAnnotations, source: str, name: Callable[[int], str]) -> Annotations:
    """The class of every image. Numbers stay; names are numbered in their sorted order.

    Declared names that are numbers are these numbers, but where they count from 1 in order: then
    they are places. Raises ArtifactError naming the first image without a class, or with a value
    that is neither.
    """
    values, classes = ([_number_or_name(v) for v in some] for some in (raw.values, raw.classes))
    if raw.are_names and any(isinstance(value, str) for value in (*values, *classes)):
        values, classes = list(raw.values), list(raw.classes)
    present = [value not in (None, "", -1) and value == value for value in values]  # -1: hidden
    _require_all(present, "labels", raw.where, source, name)
    kind, limit = type(values[0]), len(raw.names) or math.inf
    for index, value in enumerate(values):
        is_class = type(value) is int and 0 <= value < limit
        is_class = is_class or (isinstance(value, str) and not raw.names)
        if not is_class or type(value) is not kind:
            raise ArtifactError(
                f"{name(index)}: {raw.values[index]!r} in {raw.where} is no class; expected whole "
                f"numbers from 0{f' to {limit - 1}' * bool(raw.names)}, or names, throughout"
            )
    found = {*values, *(each for each in classes if isinstance(each, kind))} - {"", -1}
    known = {n: str(n) for n in sorted(found) if n >= 0} if kind is int else {}
    if raw.names:
        numbers = list(range(len(raw.names)))
        if all(name.isascii() and name.isdigit() for name in raw.names):
            named = [int(name) for name in raw.names]
            if len(set(named)) == len(named) and named != [number + 1 for number in numbers]:
                numbers = named
        known = dict(zip(numbers, raw.names, strict=True))
        values = [numbers[value] for value in values]
    elif kind is str:
        known = dict(enumerate(sorted(found)))
        number_of = {name: number for number, name in known.items()}
        values = [number_of[value] for value in values]
    count = max(len(raw.names), max(known) + 1)
    return Annotations(labels=tuple(values), num_classes=count, classes=known)


def _number_or_name(value: Any) -> Any:
    """Text and floats that are whole numbers as these numbers: a CSV knows no types."""
    if isinstance(value, str):
        text = value.strip()
        return int(float(text)) if re.fullmatch(r"-?[0-9]{1,15}(\.0+)?", text) else text
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _require_all(
    present: Sequence[bool], what: str, where: str, source: str, name: Callable[[int], str]
) -> None:
    if absent := len(present) - sum(present):
        raise ArtifactError(
            f"{source}: {what} missing for {absent} of {len(present)} images, the first "
            f"{name(present.index(False))}; looked in {where}; add them or remove the images"
        )


# folders


def folder_annotations(
    source: ImageSource, files: Sequence[Path], *, wants: str, column: str | None
) -> RawAnnotations:
    """The captions (wants `text`) or classes (wants `class`) of `files`, images of a folder.

    Raises ArtifactError if there are none at all, or metadata and images disagree.
    """
    names = (column,) if column else COLUMNS[wants]
    tables = [_read_metadata(path) for path in source.others if path.name in METADATA_NAMES]
    if wants == "class":
        tables += [_read_stylegan(p) for p in source.others if p.name == "dataset.json"]
    columns = [table.column(names) for table in tables]
    stems = {path.with_suffix("") for path in source.files}
    beside = [
        path for kind in (*_BESIDE[wants], ".json") for path in source.others
        if path.suffix.lower() == kind and path.with_suffix("") in stems
        and (column is None or kind in (f".{column}", ".json"))
    ]  # fmt: skip
    if any(columns):
        values: dict[Path, Any] = {}
        for table, own in zip(tables, columns, strict=True):
            _add_rows(values, table, own, {*source.files})
        found = {own: table for own, table in zip(columns, tables, strict=True) if own}
        where = f"column {' or '.join(map(repr, found))} of {next(iter(found.values())).path.name}"
        return RawAnnotations([values.get(path) for path in files], where, [*values.values()])
    told = _read_beside(beside, wants, column)
    kohya = [re.fullmatch("([0-9]+)_(.+)", path.parent.name) for path in files]
    if told or (wants == "text" and column is None and all(kohya)):
        called = [match[2].strip() if match and wants == "text" else None for match in kohya]
        shown = [told.get(f.with_suffix(""), own) for f, own in zip(files, called, strict=True)]
        counts = [int(match[1]) if match else 1 for match in kohya]
        repeats = _repeats(source, files, counts) if wants == "text" else ()
        return RawAnnotations(shown, "the files beside the images", repeats=repeats)
    branches = {}  # by folder, the names of the folders on the way to it, without those of splits
    for folder in {file.parent for file in source.files}:
        way = [one for one in (folder, *folder.parents) if source.path in one.parents]
        branches[folder] = tuple(o.name for o in reversed(way) if o not in source.split_folders)
    if wants == "class" and column is None and any(branches.values()):
        captions = {path.suffix.lower() for path in source.others} & {*_BESIDE["text"]}
        if captions and all(kohya):
            raise NoAnnotations(
                f"{source.name}: no classes: {files[0].parent.name} and others are folders of "
                f"repeats (kohya's), whose names are no classes; give metadata with a column label"
            )
        return _folder_names(source, files, branches)
    there = ", ".join(dict.fromkeys(name for table in tables for name in table.columns))
    raise NoAnnotations(
        f"{source.name}: no column {' or '.join(names)} in {tables[0].path.name}; columns: {there}"
        if tables
        else f"{source.name}: no {'captions' if wants == 'text' else 'classes'}: looked for "
        f"{' or '.join(METADATA_NAMES)} with file_name and {' or '.join(names)}, and for files "
        f"beside the images, such as {files[0].with_suffix(_BESIDE[wants][0]).name}"
    )


def _read_metadata(path: Path) -> TextTable:
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        try:
            table = TextTable(
                path, pyarrow.parquet.ParquetFile(BytesIO(read_bytes(path))).read().to_pylist()
            )
        except (pyarrow.ArrowException, OSError) as error:
            raise ArtifactError(f"{path}: broken or not parquet: {error}") from error
    else:
        table = read_text_table(path)
    if not table.rows:
        raise ArtifactError(f"{path}: the file is empty; write one row per image, or remove it")
    if "file_name" not in table.columns:
        raise ArtifactError(
            f"{path}: no column file_name, the image of a row; columns: {', '.join(table.columns)}"
        )
    return table


def _read_stylegan(path: Path) -> TextTable:
    """The classes in a `dataset.json` of StyleGAN or EDM: pairs of a file and a number."""
    document = parse_json(read_text(path), f"{path}:")
    labels = document.get("labels") if isinstance(document, dict) else None
    if labels is None:
        raise NoAnnotations(f"{path}: no labels in it, so its images have no classes")
    if not isinstance(labels, list) or not all(isinstance(p, list) and len(p) == 2 for p in labels):
        raise ArtifactError(f"{path}: expected labels as pairs of a file and a class, or null")
    return TextTable(path, [{"file_name": name, "label": label} for name, label in labels])


def _add_rows(
    values: dict[Path, Any], table: TextTable, column: str | None, images: set[Path]
) -> None:
    """Add the value of each row to its image."""
    strangers = []
    for number, row in enumerate(table.rows, 1):
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise ArtifactError(f"{table.path}: row {number} has no file_name")
        path = Path(os.path.normpath(table.path.parent / file_name))
        value = row.get(column) if column else None
        if path not in images:
            is_there = path.is_relative_to(table.path.parent) and exists(path)
            strangers += [] if is_there else [file_name]  # else of no kind or split that is read
        elif value != values.setdefault(path, value):
            raise NoAnnotations(
                f"{table.path}: row {number} names {file_name} again, with another {column}; "
                f"keep one row per image"
            )
    if strangers:
        raise NoAnnotations(
            f"{table.path}: {len(strangers)} of {len(table.rows)} rows name images that are not "
            f"there, the first {strangers[0]}; remove the rows or add the images"
        )


def _read_beside(beside: Sequence[Path], wants: str, column: str | None) -> dict[Path, Any]:
    """By image without its suffix, what the first file beside it tells in its first line."""
    told: dict[Path, Any] = {}
    for path in beside:
        stem = path.with_suffix("")
        if stem in told:
            continue
        if path.suffix.lower() == ".json":
            document = parse_json(read_text(path), f"{path}:")
            fields = (column,) if column else JSON_FIELDS[wants]
            for name in fields if isinstance(document, dict) else ():
                if document.get(name) is not None:
                    told.setdefault(stem, document[name])
        else:
            lines = [line for line in lines_of(read_text(path)) if line.strip()]
            told[stem] = lines[0] if lines else ""
            if len(lines) > 1:
                first = "of several lines beside an image the first is taken"
                console.note_once(first, f", as of {path.name}")
    return told


def _repeats(source: ImageSource, files: Sequence[Path], counts: Sequence[int]) -> Sequence[int]:
    """How often training sees each image by the counts of kohya's folders; () for once."""
    repeats = [count // (math.gcd(*counts) or 1) for count in counts]
    if max(repeats) == 1:
        return ()
    shown = Counter(dict(zip([path.parent.name for path in files], repeats, strict=True)))
    listed = ", ".join(f"{name} {count}" for name, count in shown.most_common(12))
    if max(repeats) > _MAX_REPEATS:
        console.note_once(f"{source.name}: these names are not taken for repeats: {listed}")
        return ()
    console.note_once(
        f"{source.name}: how often training sees an image, by its folder (kohya): {listed}"
    )
    return repeats


def _folder_names(
    source: ImageSource, files: Sequence[Path], branches: Mapping[Path, tuple[str, ...]]
) -> RawAnnotations:
    """The folder each image lies in, None for an image at the root: its class.

    Where images lie at several depths, it is the folder at the root, as torchvision has it; where
    at one, the innermost level of more than one name, as `datasets` has it.
    """
    depths = {len(branch) for branch in branches.values()}
    levels = [0] if len(depths) > 1 else range(max(depths) - 1, -1, -1)
    named = [
        {folder: (*branch, None)[min(level, len(branch))] for folder, branch in branches.items()}
        for level in levels
    ]
    names = next((several for several in named if len({*several.values()}) > 1), named[0])
    where = "the names of sub-folders (there is no metadata)"
    everything = [name for name in names.values() if name is not None]
    return RawAnnotations([names[file.parent] for file in files], where, everything, are_names=True)
