"""Rows of text files: CSV, TSV and lines of JSON, each row a dict by column. Nothing else is read.

A TSV takes quotation marks as they are: a tab never stands inside a field, and prompts are full of
unpaired quotes. A CSV follows RFC 4180. Files are UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_cli.errors import ArtifactError, reading


@dataclass(frozen=True)
class TextTable:
    """The rows of a file. `columns` are those of the header, or all keys of the JSON lines."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]

    def column(self, names: Sequence[str]) -> str | None:
        """The first of `names` that is a column, in whatever case it is written."""
        written = {column.lower(): column for column in reversed(self.columns)}
        return next((written[name.lower()] for name in names if name.lower() in written), None)


def read_text_table(path: Path) -> TextTable:
    """The rows of a .csv, .tsv or .jsonl file.

    Raises MissingError if it cannot be read, ArtifactError naming the row or line that is wrong.
    """
    text = read_text(path)
    if path.suffix.lower() != ".jsonl":
        return _read_separated(path, text)
    rows = []
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            rows.append(parse_json(line, f"{path}: line {number} is"))
            if not isinstance(rows[-1], dict):
                told = f"expected a JSON object, found {line.strip()}"
                raise ArtifactError(f"{path}: line {number}: {told}")
    return table_of(path, rows)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises MissingError or ArtifactError naming it."""
    try:
        with reading(path):
            return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8 text"
        ) from error


def parse_json(text: str, where: str) -> Any:
    """A document of JSON. Raises ArtifactError beginning with `where`, as in `x.json:`."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{where} not JSON ({error})") from error


def lines_of(text: str) -> list[str]:
    """Lines ended by a newline of any system; the rarer separators of Unicode stay in the line."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def table_of(path: Path, rows: Iterable[dict[str, Any]]) -> TextTable:
    """A table of dicts, its columns all their keys."""
    rows = list(rows)
    return TextTable(path, tuple(dict.fromkeys(key for row in rows for key in row)), rows)


def _read_separated(path: Path, text: str) -> TextTable:
    """The rows of a CSV or TSV under its header; rows longer or shorter than it are refused."""
    is_tsv, rows = path.suffix.lower() == ".tsv", []
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if is_tsv else ",",
        quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL,
    )
    try:
        header = next(reader, [])
        for number, fields in enumerate(filter(None, reader), 1):
            if len(fields) != len(header):
                raise ArtifactError(
                    f"{path}: row {number} has {len(fields)} fields, the header {len(header)}; "
                    f"put text that holds a separator into quotation marks"
                )
            rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise ArtifactError(f"{path}: line {reader.line_num} cannot be read ({error})") from error
    return TextTable(path, tuple(header), rows)
