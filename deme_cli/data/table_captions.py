"""Captions and classes in the columns of a table: parquet, hub datasets, webdataset shards.

Shards of webdataset hold text in `txt` and anything in `json`, whose fields count as columns too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deme_cli.data.captions import Annotations, NoAnnotations, columns_for

if TYPE_CHECKING:
    from datasets import Dataset

_TEXT_FIELD, _JSON_FIELD = "txt", "json"
_JSON_CAPTIONS = ("caption", "text", "prompt")


def table_annotations(
    label: str, rows: Dataset, splits: Sequence[Dataset], *, wants: str, column: str | None
) -> Annotations:
    """The captions (wants `text`) or classes (wants `class`) of the rows; `label` in messages.

    splits: tables whose classes are counted, too. Raises ArtifactError naming the columns there are
    if none serves.
    """
    name, field = _find_column(label, rows, wants, column)
    where = f"column {name!r}" if field is None else f"field {field!r} of column {name!r}"
    values = _values(rows, name, field)
    if wants == "text":
        return Annotations(values, where)
    names = getattr(rows.features[name], "names", None) or ()  # of a ClassLabel
    classes = [
        value
        for table in splits
        if name in table.features and not names
        for value in _values(table, name, field)
    ]
    return Annotations(values, where, classes, names)


def _find_column(
    label: str, rows: Dataset, wants: str, column: str | None
) -> tuple[str, str | None]:
    """The column, and the field within it where it is the `json` of a shard."""
    from datasets import Image

    columns = [name for name, kind in rows.features.items() if not isinstance(kind, Image)]
    fields = list(_json_fields(rows))
    names = columns_for(wants, column)
    extra = (_TEXT_FIELD,) if wants == "text" and column is None else ()
    for name in (*names, *extra):
        if name in columns:
            return name, None
    for name in _JSON_CAPTIONS if wants == "text" and column is None else names:
        if name in fields:
            return _JSON_FIELD, name
    within = f"; fields of json: {', '.join(fields)}" if fields else ""
    raise NoAnnotations(
        f"{label}: no column {' or '.join((*names, *extra))} for the "
        f"{'captions' if wants == 'text' else 'classes'}; "
        f"columns: {', '.join(rows.features)}{within}"
    )


def _json_fields(rows: Dataset) -> Sequence[str]:
    """The fields of the `json` column: declared, or those of its first rows."""
    kind = rows.features.get(_JSON_FIELD)
    if isinstance(kind, Mapping):
        return tuple(kind)
    first = rows.select_columns([_JSON_FIELD])[:5][_JSON_FIELD] if kind is not None else ()
    return tuple(dict.fromkeys(key for row in map(_document, first) for key in row))


def _values(rows: Dataset, name: str, field: str | None) -> list[Any]:
    """The values of a column; no other column is read."""
    values: list[Any] = []
    for batch in rows.select_columns([name]).iter(batch_size=10_000):
        values += batch[name]
    return values if field is None else [_document(value).get(field) for value in values]


def _document(value: Any) -> dict[str, Any]:
    """An object of JSON, read or still text; empty where it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            value = None
    return value if isinstance(value, dict) else {}
