"""Texts from files: rows of tables, and the prompts that an argument names. Nothing downloads.

Known prompts: `parti` (PartiPrompts, Yu et al. 2022), `coco` (30,000 captions of MS-COCO val2014),
`imagenet` (the 1,000 class names of Radford et al. 2021, in open_clip) and `digits`. The last two
cycle: image i shows class i mod K. Nothing but `imagenet` needs torch here.

A TSV takes quotation marks as they are: a tab never stands inside a field, and prompts are full of
unpaired quotes. A CSV follows RFC 4180. Files are UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_cli.data.archives import read_bytes
from deme_cli.data.digits import DIGIT_CAPTIONS
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.fetch import Asset, missing, sha256_of

KNOWN_PROMPTS = ("parti", "coco", "imagenet", "digits")
TEXT = "text:"  # before a prompt that is given itself
PROMPT_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl")
IMAGENET_TEMPLATE = "a photo of a {}"
_COLUMNS = ("prompt", "caption", "text")
_RAW = "https://raw.githubusercontent.com/"
_ASSETS = {
    "parti": Asset(
        "PartiPrompts.tsv",
        "1,632 prompts of PartiPrompts",
        _RAW + "google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/PartiPrompts.tsv",
        "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
    ),
    "coco": Asset(
        "coco_30k.csv",
        "30,000 captions of MS-COCO val2014",
        _RAW + "rohitgandikota/erasing/3d10dd1b2df4ec4e74edcadac4200c7401585138/data/coco_30k.csv",
        "42c57b188c8f1f8a77cddfa11cde89e83fcbdd4dcd4fc6c840fb4e046d395383",
    ),
}


@dataclass(frozen=True)
class TextTable:
    """The rows of a file, each a dict by column."""

    path: Path
    rows: list[dict[str, Any]]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def column(self, names: Sequence[str]) -> str | None:
        """The first of `names` that is a column, in whatever case it is written."""
        written = {column.lower(): column for column in reversed(self.columns)}
        return next((written[name.lower()] for name in names if name.lower() in written), None)


def read_text_table(path: Path) -> TextTable:
    """The rows of a .csv, .tsv or .jsonl file.

    Raises MissingError if it cannot be read, ArtifactError naming the row or line that is wrong.
    """
    text, suffix = read_text(path), path.suffix.lower()
    rows: list[dict[str, Any]] = []
    if suffix == ".jsonl":
        for number, line in enumerate(lines_of(text), 1):
            if line.strip():
                row = parse_json(line, f"{path}: line {number} is")
                if not isinstance(row, dict):
                    where = f"{path}: line {number}"
                    raise ArtifactError(f"{where}: expected a JSON object, found {line.strip()}")
                rows.append(row)
        return TextTable(path, rows)
    lines = io.StringIO(text, newline="")
    is_tsv = suffix == ".tsv"
    reader = csv.reader(lines, "excel-tab", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(lines)
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
    return TextTable(path, rows)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or one in a zip. Raises MissingError, ArtifactError naming it."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 at byte {error.start}; save it as UTF-8 text"
        raise ArtifactError(f"{path}: {what}") from error


def parse_json(text: str, where: str) -> Any:
    """A document of JSON. Raises ArtifactError beginning with `where`, as in `x.json:`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of thousands of digits
        raise ArtifactError(f"{where} not JSON ({error})") from error


def lines_of(text: str) -> list[str]:
    """Lines ended by a newline of any system; the rarer separators of Unicode stay in the line."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


# prompts


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order. `classes`, where there are any, hold one number per prompt.

    `sha256` is of prompts and classes, whatever file held them. A set that `cycles` goes on from
    its beginning; `template` is what its prompts were made by. `files` are the images that show
    them, where the file tells.
    """

    source: str
    prompts: tuple[str, ...]
    classes: tuple[int, ...] | None = None
    cycles: bool = False
    template: str | None = None
    files: tuple[str | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([self.prompts, self.classes]).encode()).hexdigest()


def prompt_assets(source: str) -> list[Asset]:
    """The files from outside that `read_prompts(source)` needs."""
    return [_ASSETS[source]] if source in _ASSETS else []


def read_prompts(source: str, *, column: str | None = None) -> PromptSet:
    """The prompts that an argument names: a file, one of KNOWN_PROMPTS, or `text:` and one prompt.

    Of a table, `column`, else the first of prompt, caption, text in any case; a column class or
    label of whole numbers comes along, and file_name. Of COCO's JSON, the first caption of each
    image.
    Raises MissingError for an absent file, ArtifactError for one without prompts, ConfigError for a
    column or a kind of file that does not exist.
    """
    if asset := _ASSETS.get(source):
        path = asset.find()
        if path is None:
            raise missing([asset], "not on this machine")
        if sha256_of(path) != asset.sha256:
            raise ArtifactError(
                f"{path}: expected the {asset.what}, sha256 {asset.sha256}, found another file; "
                f"remove it and fetch {asset.url}"
            )
        return _of_file(source, path, column)
    if source.startswith(TEXT):
        known = PromptSet(source, (source.removeprefix(TEXT),), cycles=True)
    elif source == "digits":
        known = PromptSet(source, DIGIT_CAPTIONS, tuple(range(10)), cycles=True)
    elif source == "imagenet":
        try:
            from open_clip import IMAGENET_CLASSNAMES as NAMES  # loads torch
        except ImportError as error:
            raise MissingError(
                "the class names of imagenet come with open_clip; install it: "
                "pip install open-clip-torch"
            ) from error
        prompts, template = tuple(map(IMAGENET_TEMPLATE.format, NAMES)), IMAGENET_TEMPLATE
        known = PromptSet(source, prompts, tuple(range(len(NAMES))), cycles=True, template=template)
    else:
        return _of_file(source, Path(source).expanduser(), column)
    _refuse_column(source, column)
    return known


def select_prompts(
    prompts: PromptSet, *, num: int | None, per_prompt: int
) -> list[tuple[str, int | None]]:
    """(prompt, class) of images 0..n-1: image i has prompt i // per_prompt.

    Of K prompts that cycle, it has prompt i mod K. num: None for as many as the set gives.
    Raises ConfigError if the set gives another number.
    """
    count = len(prompts)
    if prompts.cycles and per_prompt != 1:
        raise ConfigError(
            f"{prompts.source}: its {count} prompts are drawn in turn, so per_prompt must be 1, "
            f"found {per_prompt}; give -n {count * per_prompt} instead"
        )
    total = count * per_prompt
    if num is not None and num != total and not prompts.cycles:
        each = f", {per_prompt} images each make {total}" if per_prompt > 1 else ""
        raise ConfigError(
            f"{prompts.source} holds {count} prompt{'s' * (count > 1)}{each}, -n says {num}; leave "
            f"-n out, give -n {total}, or give a file of as many prompts as you want"
        )
    chosen = range(total if num is None else num)
    order = [i % count if prompts.cycles else i // per_prompt for i in chosen]
    classes = prompts.classes or (None,) * count
    return [(prompts.prompts[index], classes[index]) for index in order]


def _of_file(source: str, path: Path, column: str | None) -> PromptSet:
    suffix = path.suffix.lower()
    if not path.exists():
        known = ", ".join(KNOWN_PROMPTS)
        raise MissingError(f"{source}: no such file; prompts are a file or one of {known}")
    if suffix not in PROMPT_SUFFIXES:
        raise ConfigError(f"{source}: prompts are a file in {', '.join(PROMPT_SUFFIXES)}")
    if suffix not in (".txt", ".json"):
        return _of_table(source, read_text_table(path), column)
    text = read_text(path)
    prompts: Any = lines_of(text) if suffix == ".txt" else parse_json(text, f"{source}:")
    if isinstance(prompts, dict) and isinstance(prompts.get("annotations"), list):
        return _of_coco(source, path, prompts, column)
    if isinstance(prompts, list) and all(isinstance(entry, dict) for entry in prompts):
        return _of_table(source, TextTable(path, prompts), column)
    if not isinstance(prompts, list) or not all(isinstance(entry, str) for entry in prompts):
        raise ArtifactError(
            f"{source}: expected COCO captions (an object with `annotations`), or a list of "
            f"strings or of objects"
        )
    _refuse_column(source, column)
    prompts = tuple(prompt.strip() for prompt in prompts if prompt.strip())
    if not prompts:
        raise ArtifactError(f"{source}: the file holds no prompts")
    return PromptSet(source, prompts)


def _refuse_column(source: str, column: str | None) -> None:
    if column is not None:
        raise ConfigError(f"{source} has no columns; leave the prompt column {column!r} out")


def _of_table(source: str, table: TextTable, column: str | None) -> PromptSet:
    if not table.rows:
        raise ArtifactError(f"{source}: the file holds no prompts")
    chosen = table.column(_COLUMNS) if column is None else column
    if chosen not in table.columns:
        there = f"columns: {', '.join(table.columns)}"
        if column is not None:
            raise ConfigError(f"{source}: no column {column!r}; {there}")
        raise ArtifactError(
            f"{source}: no column {', '.join(_COLUMNS)}; {there}; name the one of the prompts with "
            f"--prompt-column"
        )
    prompts = []
    for number, row in enumerate(table.rows, 1):
        prompt = row.get(chosen)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ArtifactError(f"{source}: row {number} has no prompt in column {chosen!r}")
        prompts.append(prompt.strip())
    files, column = None, table.column(("file_name", "filename"))
    if column is not None:
        files = tuple(str(row[column]) if row.get(column) else None for row in table.rows)
    return PromptSet(source, tuple(prompts), _classes(source, table), files=files)


def _classes(source: str, table: TextTable) -> tuple[int, ...] | None:
    """A column of whole numbers, one per row; None if there is none, or if it holds words."""
    column = table.column(("class", "label"))
    values = [str(row.get(column)).strip() for row in table.rows if column]
    whole = [value.isascii() and value.isdigit() for value in values]
    if not any(whole):
        return None
    if not all(whole):
        first = whole.index(False)
        raise ArtifactError(
            f"{source}: row {first + 1} has {values[first]!r} in column {column!r}; "
            f"expected a whole number, as in other rows"
        )
    return tuple(int(value) for value in values)


def _of_coco(source: str, path: Path, document: dict[str, Any], column: str | None) -> PromptSet:
    """Of each image, in the order of their ids, the caption of the lowest annotation id."""
    field = column or "caption"
    first: dict[int, dict[str, Any]] = {}
    for number, entry in enumerate(document["annotations"], 1):
        entry = entry if isinstance(entry, dict) else {}
        image, own = entry.get("image_id"), entry.get("id")
        caption = str(entry.get(field) or "").strip()
        if not (isinstance(image, int) and isinstance(own, int) and caption):
            raise (ConfigError if column else ArtifactError)(
                f"{source}: annotation {number} is no caption: expected image_id, id and {field}, "
                f"found {', '.join(entry) or 'none of them'}; take the file of captions"
            )
        if image not in first or own < first[image]["id"]:
            first[image] = entry
    names = {
        image.get("id"): image.get("file_name")
        for image in document.get("images") or () if isinstance(image, dict)
    }  # fmt: skip
    rows = [
        {"prompt": str(entry[field])} | ({"file_name": names.get(image)} if names else {})
        for image, entry in sorted(first.items())
    ]
    return _of_table(source, TextTable(path, rows), None)
