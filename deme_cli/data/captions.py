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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_cli import console
from deme_cli.data.image_source import ImageSource
from deme_cli.data.text_tables import (
    TextTable,
    lines_of,
    parse_json,
    read_text,
    read_text_table,
    table_of,
)
from deme_cli.errors import ArtifactError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
COLUMNS = {"text": ("text", "caption", "prompt"), "class": ("label", "labels", "cls")}
JSON_FIELDS = {"text": ("caption", "text", "prompt"), "class": COLUMNS["class"]}
_BESIDE = {"text": (".txt", ".caption"), "class": (".cls",)}
CALLED = {"text": "captions", "class": "classes"}
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
    _require_all(list(map(bool, cleaned)), "captions", raw.where, source, name)
    return Annotations(cleaned, repeats=raw.repeats)


def read_labels(raw: RawAnnotations, source: str, name: Callable[[int], str]) -> Annotations:
    """The class of every image. Numbers stay; names are numbered in their sorted order.

    Raises ArtifactError naming the first image without a class, or with a value that is neither.
    """
    numbers = _declared(raw.names)
    values, classes = (list(map(_number_or_name, some)) for some in (raw.values, raw.classes))
    if raw.are_names and not all(isinstance(value, int) for value in (*values, *classes)):
        values, classes = list(raw.values), list(raw.classes)
    present = [value not in (None, "", -1) and value == value for value in values]  # -1: hidden
    _require_all(present, "labels", raw.where, source, name)
    kind, limit = type(values[0]), len(numbers) if numbers else math.inf
    for index, value in enumerate(values):
        is_class = isinstance(value, str) and not numbers
        is_class = is_class or (type(value) is int and 0 <= value < limit)
        if not is_class or type(value) is not kind:
            raise ArtifactError(
                f"{name(index)}: {raw.values[index]!r} in {raw.where} is no class; expected "
                f"whole numbers from 0{f' to {len(numbers) - 1}' * bool(numbers)}, or names, "
                f"throughout"
            )
    if numbers:
        known = dict(zip(numbers, raw.names, strict=True))
        values = [numbers[value] for value in values]
    else:
        ordered = sorted({*values, *(value for value in classes if isinstance(value, kind))} - {""})
        known = dict(enumerate(ordered)) if kind is str else {n: str(n) for n in ordered if n >= 0}
        number_of = {each: number for number, each in known.items()}
        values = [number_of[value] for value in values] if kind is str else values
    count = max(len(numbers), max(known) + 1)
    return Annotations(labels=tuple(values), num_classes=count, classes=known)


def _declared(names: Sequence[str]) -> list[int]:
    """The number of each declared class: that of its name where all are numbers, else its place.

    Names that count from 1 in order are left to their places, as datasets of such names mean them.
    """
    if all(name.isascii() and name.isdigit() for name in names):
        numbers = [int(name) for name in names]
        if len(set(numbers)) == len(names) and numbers != list(range(1, len(names) + 1)):
            return numbers
    return list(range(len(names)))


def describe_classes(classes: Mapping[int, str], where: str) -> str:
    """`3 classes by the names of sub-folders: 0 cat, 1 dog, 2 emu`; of many, the first and last."""
    shown = [
        name if name == str(number) else f"{number} {name}"
        for number, name in sorted(classes.items())
    ]
    listed = shown if len(shown) <= 12 else [*shown[:8], "…", *shown[-2:]]
    return f"{len(shown)} class{'es' * (len(shown) > 1)} by {where}: {', '.join(listed)}"


def _numbers_or_names(values: Sequence[Any]) -> list[Any]:
    """Text and floats that are whole numbers as these numbers: a CSV knows no types."""
    return [_number_or_name(value) for value in values]


def _number_or_name(value: Any) -> Any:
    if isinstance(value, str):
        text = value.strip()
        return int(float(text)) if re.fullmatch(r"-?[0-9]{1,15}(\.0+)?", text) else text
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _require_all(
    present: Sequence[bool], what: str, where: str, source: str, name: Callable[[int], str]
) -> None:
    absent = len(present) - sum(present)
    if absent:
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
    tables = list(_read_tables(source, wants))
    names = (column,) if column else COLUMNS[wants]
    chosen = [
        (column if column in table.columns else None) if column else table.column(names)
        for table in tables
    ]
    beside = _find_beside(source, wants, column)
    if any(chosen):
        values: dict[Path, Any] = {}
        for table, own in zip(tables, chosen, strict=True):
            _add_rows(values, table, own, set(source.files))
        columns = dict.fromkeys(name for name in chosen if name)
        first = next(table for table, own in zip(tables, chosen, strict=True) if own)
        where = f"column {' or '.join(map(repr, columns))} of {first.path.name}"
        if any(path.suffix != ".json" for paths in beside.values() for path in paths):
            console.note_once(f"{source.name}: {where} is read, the files beside images are not")
        return RawAnnotations([values.get(path) for path in files], where, [*values.values()])
    told = _read_beside(source, beside, wants, column)
    if told or (wants == "text" and column is None and all(map(_repeats_and_name, files))):
        return _of_files_beside(source, files, told, wants)
    branches = {parent: _branch(source, parent) for parent in {f.parent for f in source.files}}
    if wants == "class" and column is None and any(branches.values()):
        return _folder_names(source, files, branches)
    if tables:
        columns = dict.fromkeys(name for table in tables for name in table.columns)
        raise NoAnnotations(
            f"{source.name}: no column {' or '.join(names)} in {tables[0].path.name}; "
            f"columns: {', '.join(columns)}"
        )
    raise NoAnnotations(
        f"{source.name}: no {CALLED[wants]}: looked for {' or '.join(METADATA_NAMES)} with "
        f"file_name and {' or '.join(names)}, and for files beside the images, such as "
        f"{files[0].with_suffix(_BESIDE[wants][0]).name}"
    )


def _read_tables(source: ImageSource, wants: str) -> Iterator[TextTable]:
    """What is told of images by name: metadata, and labels where classes are wanted."""
    for path in source.others:
        if path.name in METADATA_NAMES:
            yield _read_metadata(path)
        elif path.name == "dataset.json" and wants == "class":
            yield from _read_stylegan(path)


def _read_metadata(path: Path) -> TextTable:
    table = _read_parquet(path) if path.suffix == ".parquet" else read_text_table(path)
    if not table.rows:
        raise ArtifactError(f"{path}: the file is empty; write one row per image, or remove it")
    if "file_name" not in table.columns:
        raise ArtifactError(
            f"{path}: no column file_name, the image of a row; columns: {', '.join(table.columns)}"
        )
    return table


def _read_parquet(path: Path) -> TextTable:
    import pyarrow
    import pyarrow.parquet

    try:
        return table_of(path, pyarrow.parquet.ParquetFile(path).read().to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ArtifactError(f"{path}: broken or not parquet: {error}") from error


def _read_stylegan(path: Path) -> Iterator[TextTable]:
    """The classes in a `dataset.json` of StyleGAN or EDM; none of a file without `labels`."""
    document = parse_json(read_text(path), f"{path}:")
    if not isinstance(document, dict) or "labels" not in document:
        return
    pairs = document["labels"]
    if pairs is None:
        raise NoAnnotations(f"{path}: its labels are null, so its images have no classes")
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise ArtifactError(f"{path}: expected labels as pairs of a file and a class, or null")
    yield table_of(path, ({"file_name": name, "label": label} for name, label in pairs))


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
            is_there = path.is_relative_to(table.path.parent) and path.exists()
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


def _find_beside(source: ImageSource, wants: str, column: str | None) -> dict[Path, list[Path]]:
    """By image without its suffix, the files beside it that may tell of it, in order of rank."""
    beside: dict[Path, list[Path]] = {path.with_suffix(""): [] for path in source.files}
    for suffix in (*_BESIDE[wants], ".json"):
        if column is None or suffix in (f".{column}", ".json"):
            for path in source.others:
                if path.suffix.lower() == suffix and (stem := path.with_suffix("")) in beside:
                    beside[stem].append(path)
    return beside


def _read_beside(
    source: ImageSource, beside: dict[Path, list[Path]], wants: str, column: str | None
) -> dict[Path, Any]:
    """By image without its suffix, what the first file beside it that tells anything tells."""
    fields = JSON_FIELDS[wants] if column is None else (column,)
    told, several = {}, 0
    for stem, paths in beside.items():
        for path in paths:
            if path.suffix.lower() == ".json":
                document = parse_json(read_text(path), f"{path}:")
                values = document if isinstance(document, dict) else {}
                lines = [values[name] for name in fields if values.get(name) is not None]
            else:
                lines = [line for line in lines_of(read_text(path)) if line.strip()] or [""]
                several += len(lines) > 1
            if lines:
                told[stem] = lines[0]
                break
    if several:
        console.note_once(
            f"{source.name}: of {several} files with several lines the first line is the caption"
        )
    return told


def _of_files_beside(
    source: ImageSource, files: Sequence[Path], told: dict[Path, Any], wants: str
) -> RawAnnotations:
    """What files beside the images tell, with kohya's repeats."""
    kohya = [_repeats_and_name(path) for path in files]
    values = [
        told.get(path.with_suffix(""), found[1] if found and wants == "text" else None)
        for path, found in zip(files, kohya, strict=True)
    ]
    counts = [found[0] if found else 1 for found in kohya]
    repeats = [count // (math.gcd(*counts) or 1) for count in counts]
    where = "the files beside the images"
    if wants == "class" or max(repeats) == 1:
        return RawAnnotations(values, where)
    shown = Counter(dict(zip([path.parent.name for path in files], repeats, strict=True)))
    listed = ", ".join(f"{name} {count}" for name, count in shown.most_common(12))
    if max(repeats) > _MAX_REPEATS:
        console.note_once(f"{source.name}: these names are not taken for repeats: {listed}")
        return RawAnnotations(values, where)
    console.note_once(
        f"{source.name}: how often training sees an image, by its folder (kohya): {listed}"
    )
    return RawAnnotations(values, where, repeats=repeats)


def _repeats_and_name(path: Path) -> tuple[int, str] | None:
    """(10, "cat") for an image in kohya's folder `10_cat`."""
    found = re.fullmatch("([0-9]+)_(.+)", path.parent.name)
    return (int(found[1]), found[2].strip()) if found else None


def _folder_names(
    source: ImageSource, files: Sequence[Path], branches: Mapping[Path, tuple[str, ...]]
) -> RawAnnotations:
    """The folder each image lies in, None for an image at the root: its class.

    Where images lie at several depths, it is the folder at the root, as torchvision has it; where
    at one, the innermost level of more than one name, as `datasets` has it. Levels that only cut a
    data set into parts are passed over.
    """
    captions = {path.suffix.lower() for path in source.others} & set(_BESIDE["text"])
    if captions and all(map(_repeats_and_name, files)):
        raise NoAnnotations(
            f"{source.name}: no classes: {files[0].parent.name} and others are folders of repeats "
            f"(kohya's), whose names are no classes; give metadata with a column label"
        )
    depths = {len(branch) for branch in branches.values()}
    levels = [0] if len(depths) > 1 else range(depths.pop() - 1, -1, -1)
    classes = [
        level for level in levels
        if not _are_parts([(branches[path.parent][level : level + 1], path) for path in files])
    ]  # fmt: skip
    if not classes:
        raise NoAnnotations(
            f"{source.name}: no classes: its sub-folders {files[0].parent.name}, … are parts of "
            f"one data set, for the numbers of the images run on from one to the next; give "
            f"dataset.json or metadata with a column label"
        )
    several = [n for n in classes if len({branch[n : n + 1] for branch in branches.values()}) > 1]
    level = (several or classes)[0]
    names = {
        parent: (*branch, None)[min(level, len(branch))] for parent, branch in branches.items()
    }
    where = "the names of sub-folders (there is no metadata)"
    everything = [name for name in names.values() if name is not None]
    return RawAnnotations([names[path.parent] for path in files], where, everything, are_names=True)


def _branch(source: ImageSource, folder: Path) -> tuple[str, ...]:
    """The names of the folders on the way to `folder`, without those of splits."""
    above = [folder, *folder.parents]
    below = above[: above.index(source.path)]
    return tuple(one.name for one in reversed(below) if one not in source.split_folders)


def _are_parts(files: Sequence[tuple[tuple[str, ...], Path]]) -> bool:
    """Whether folders such as 00000, 00001 hold one run of numbered images, cut into parts.

    So do those of StyleGAN, FFHQ and img2dataset; in folders of classes the numbers start anew.
    """
    spans: dict[str, list[int]] = {}
    for name, path in files:
        number = re.search("[0-9]+(?=[^0-9]*$)", path.stem)
        if not name or not re.fullmatch("[0-9]{5,}", name[0]) or not number:
            return False
        spans.setdefault(name[0], []).append(int(number[0]))
    ends = [end for name in sorted(spans) for end in (min(spans[name]), max(spans[name]))]
    return len(set(map(len, spans))) == 1 and all(
        ends[i] < ends[i + 1] for i in range(1, len(ends) - 1, 2)
    )
