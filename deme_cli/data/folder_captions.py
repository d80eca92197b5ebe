"""Captions and classes that lie with the images of a folder, in the layouts of other tools.

- `metadata.jsonl`, `.csv` or `.parquet`, at the root or in any folder below it, with a column
  `file_name` relative to itself: imagefolder of `datasets`
- `dataset.json` with `labels`: StyleGAN and EDM
- `x.txt`, `x.caption`, `x.cls` or `x.json` beside `x.png`: kohya's scripts and img2dataset. Of
  kohya's folders `10_name`, training sees each image 10 times, and an image without a caption is
  called by the name.

Without any of these, the folder that an image lies in is its class.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deme_cli import console
from deme_cli.data.captions import Annotations, NoAnnotations, columns_for
from deme_cli.data.image_source import ImageFolder
from deme_cli.data.text_tables import TextTable, lines_of, read_text, read_text_table, table_of
from deme_cli.errors import ArtifactError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_MAX_REPEATS = 100  # more is a year or a number of its own
_LABELS_NAME = "dataset.json"
_BESIDE = {"text": (".txt", ".caption"), "class": (".cls",)}
_JSON_FIELDS = {"text": ("caption", "text", "prompt"), "class": ("label", "labels", "cls")}


def folder_annotations(
    place: ImageFolder, files: Sequence[Path], *, wants: str, column: str | None
) -> Annotations:
    """The captions (wants `text`) or classes (wants `class`) of `files`, images of a folder.

    Raises ArtifactError if there are none at all, or metadata and images disagree.
    """
    tables = list(_read_tables(place, wants))
    names = columns_for(wants, column)
    chosen = [_column(table, names, column) for table in tables]
    beside = _find_beside(place, wants, column)
    if any(chosen):
        values: dict[Path, Any] = {}
        images = set(place.files)
        for table, name in zip(tables, chosen, strict=True):
            _add_rows(values, table, name, images)
        columns = dict.fromkeys(name for name in chosen if name)
        first = next(table for table, name in zip(tables, chosen, strict=True) if name)
        where = f"column {' or '.join(map(repr, columns))} of {first.path.name}"
        if any(path.suffix != ".json" for paths in beside.values() for path in paths):
            console.note_once(f"{place.source}: {where} is read, the files beside images are not")
        return Annotations([values.get(path) for path in files], where, [*values.values()])
    told = _read_beside(place, beside, wants, column)
    if told or (wants == "text" and column is None and all(map(_repeats_and_name, files))):
        return _of_files_beside(place, files, told, wants)
    branches = {parent: _branch(place, parent) for parent in {path.parent for path in place.files}}
    if wants == "class" and column is None and any(branches.values()):
        return _folder_names(place, files, branches)
    what = "captions" if wants == "text" else "classes"
    if tables:
        columns = dict.fromkeys(name for table in tables for name in table.columns)
        raise NoAnnotations(
            f"{place.source}: no column {' or '.join(names)} in {tables[0].path.name}; "
            f"columns: {', '.join(columns)}"
        )
    raise NoAnnotations(
        f"{place.source}: no {what}: looked for {' or '.join(METADATA_NAMES)} with file_name and "
        f"{' or '.join(names)}, and for files beside the images, such as "
        f"{files[0].with_suffix(_BESIDE[wants][0]).name}"
    )


def _read_tables(place: ImageFolder, wants: str) -> Iterator[TextTable]:
    """What is told of images by name: metadata, and labels where classes are wanted."""
    for path in place.others:
        if path.name in METADATA_NAMES:
            yield _read_metadata(path)
        elif path.name == _LABELS_NAME and wants == "class":
            yield from _read_labels(path)


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


def _read_labels(path: Path) -> Iterator[TextTable]:
    """The classes in a `dataset.json` of StyleGAN or EDM; none of a file without `labels`."""
    document = _read_json(path)
    if not isinstance(document, dict) or "labels" not in document:
        return
    pairs = document["labels"]
    if pairs is None:
        raise NoAnnotations(f"{path}: its labels are null, so its images have no classes")
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise ArtifactError(f"{path}: expected labels as pairs of a file and a class, or null")
    yield table_of(path, [{"file_name": name, "label": label} for name, label in pairs])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not JSON ({error})") from error


def _column(table: TextTable, names: Sequence[str], asked: str | None) -> str | None:
    """The column to take: exactly the one asked for, or a usual one in whatever case."""
    return (asked if asked in table.columns else None) if asked else table.column(names)


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


def _find_beside(place: ImageFolder, wants: str, column: str | None) -> dict[Path, list[Path]]:
    """By image without its suffix, the files beside it that may tell of it, in order of rank."""
    suffixes = [*_BESIDE[wants], ".json"]
    if column is not None:
        suffixes = [suffix for suffix in suffixes if suffix in (f".{column}", ".json")]
    stems = {path.with_suffix("") for path in place.files}
    found: dict[Path, list[Path]] = {}
    ranked = {
        suffix: [path for path in place.others if path.suffix.lower() == suffix]
        for suffix in suffixes
    }
    for paths in ranked.values():
        for path in paths:
            if (stem := path.with_suffix("")) in stems:
                found.setdefault(stem, []).append(path)
    return found


def _read_beside(
    place: ImageFolder, beside: dict[Path, list[Path]], wants: str, column: str | None
) -> dict[Path, Any]:
    """By image without its suffix, what the first file beside it that tells anything tells."""
    fields = _JSON_FIELDS[wants] if column is None else (column,)
    told, several = {}, 0
    for stem, paths in beside.items():
        for path in paths:
            if path.suffix.lower() == ".json":
                document = _read_json(path)
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
            f"{place.source}: of {several} files with several lines the first line is the caption"
        )
    return told


def _of_files_beside(
    place: ImageFolder, files: Sequence[Path], told: dict[Path, Any], wants: str
) -> Annotations:
    """What files beside the images tell, with kohya's repeats."""
    kohya = [_repeats_and_name(path) for path in files]
    values = [
        told.get(path.with_suffix(""), found[1] if found and wants == "text" else None)
        for path, found in zip(files, kohya, strict=True)
    ]
    counts = [found[0] if found else 1 for found in kohya]
    shares = math.gcd(*counts)
    repeats = [count // shares for count in counts] if shares else counts
    where = "the files beside the images"
    if wants == "class" or max(repeats) == 1:
        return Annotations(values, where)
    shown = Counter(dict(zip([path.parent.name for path in files], repeats, strict=True)))
    listed = ", ".join(f"{name} {count}" for name, count in shown.most_common(12))
    if max(repeats) > _MAX_REPEATS:
        console.note_once(f"{place.source}: these names are not taken for repeats: {listed}")
        return Annotations(values, where)
    console.note_once(
        f"{place.source}: how often training sees an image, by its folder (kohya): {listed}"
    )
    return Annotations(values, where, repeats=repeats)


def _repeats_and_name(path: Path) -> tuple[int, str] | None:
    """(10, "cat") for an image in kohya's folder `10_cat`."""
    found = re.fullmatch("([0-9]+)_(.+)", path.parent.name)
    return (int(found[1]), found[2].strip()) if found else None


def _folder_names(
    place: ImageFolder, files: Sequence[Path], branches: Mapping[Path, tuple[str, ...]]
) -> Annotations:
    """The folder each image lies in, None for an image at the root: its class.

    Where images lie at several depths, it is the folder at the root, as torchvision has it; where
    at one, the innermost level of more than one name, as `datasets` has it. Levels that only cut a
    data set into parts are passed over.
    """
    captions = {path.suffix.lower() for path in place.others} & set(_BESIDE["text"])
    if captions and all(map(_repeats_and_name, files)):
        raise NoAnnotations(
            f"{place.source}: no classes: {files[0].parent.name} and others are folders of repeats "
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
            f"{place.source}: no classes: its sub-folders {files[0].parent.name}, … are parts of "
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
    return Annotations([names[path.parent] for path in files], where, everything, are_names=True)


def _branch(place: ImageFolder, folder: Path) -> tuple[str, ...]:
    """The names of the folders on the way to `folder`, without those of splits."""
    above = [folder, *folder.parents]
    below = above[: above.index(place.path)]
    return tuple(one.name for one in reversed(below) if one not in place.split_folders)


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
