"""Captions and classes beside the images of a folder: the imagefolder convention.

`metadata.jsonl` or `metadata.csv`, at the root or in any folder below it, with a column `file_name`
relative to itself. Without metadata, the folder that an image lies in is its class.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deme_cli.data.captions import Annotations, columns_for
from deme_cli.data.places import ImageFolder, find_files
from deme_cli.data.text_tables import TextTable, read_text_table
from deme_cli.errors import ArtifactError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


def folder_annotations(place: ImageFolder, wants: str, column: str | None) -> Annotations:
    """The captions (wants `text`) or classes (wants `class`) of a folder's images, in their order.

    Raises ArtifactError if there are none at all, or metadata and images disagree.
    """
    paths = [path for path in find_files(place.path, METADATA_NAMES) if path.name in METADATA_NAMES]
    names = columns_for(wants, column)
    if not paths and wants == "class" and column is None:
        return _folder_names(place)
    if not paths:
        raise ArtifactError(
            f"{place.source}: no {'captions' if wants == 'text' else 'classes'}: looked for "
            f"{' or '.join(METADATA_NAMES)} with file_name and {' or '.join(names)}"
        )
    tables = [_read_metadata(path) for path in paths]
    chosen = [_column(table, names, column) for table in tables]
    if not any(chosen):
        columns = dict.fromkeys(name for table in tables for name in table.columns)
        raise ArtifactError(
            f"{place.source}: no column {' or '.join(names)} in {paths[0].name}; "
            f"columns: {', '.join(columns)}"
        )
    values: dict[Path, Any] = {}
    for table, name in zip(tables, chosen, strict=True):
        _add_rows(values, table, name, set(place.files))
    found = dict.fromkeys(name for name in chosen if name)
    where = f"column {' or '.join(map(repr, found))} of {paths[0].name}"
    return Annotations([values.get(path) for path in place.files], where)


def _folder_names(place: ImageFolder) -> Annotations:
    """The folder each image lies in; None for an image at the root."""
    names = [None if path.parent == place.path else path.parent.name for path in place.files]
    where = "the names of sub-folders (there is no metadata)"
    return Annotations(names, where, are_names=True)


def _read_metadata(path: Path) -> TextTable:
    table = read_text_table(path)
    if not table.rows:
        raise ArtifactError(f"{path}: the file is empty; write one row per image, or remove it")
    if "file_name" not in table.columns:
        raise ArtifactError(
            f"{path}: no column file_name, the image of a row; columns: {', '.join(table.columns)}"
        )
    return table


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
            strangers.append(file_name)
        elif value != values.setdefault(path, value):
            raise ArtifactError(
                f"{table.path}: row {number} names {file_name} again, with another {column}; "
                f"keep one row per image"
            )
    if strangers:
        raise ArtifactError(
            f"{table.path}: {len(strangers)} of {len(table.rows)} rows name images that are not "
            f"there, the first {strangers[0]}; remove the rows or add the images"
        )
