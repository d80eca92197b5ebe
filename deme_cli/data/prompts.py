"""Prompts to draw images for: from a file, or from a set known by its name. Nothing here downloads.

Known names: `parti` (PartiPrompts, Yu et al. 2022), `coco` (30,000 captions of MS-COCO val2014),
`imagenet` (the 1,000 class names of Radford et al. 2021, in open_clip) and `digits`. The last two
cycle: image i shows class i mod K. Nothing but `imagenet` needs torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deme_cli.data.digits import DIGIT_CAPTIONS
from deme_cli.data.text_tables import (
    TextTable,
    lines_of,
    parse_json,
    read_text,
    read_text_table,
    table_of,
)
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.fetch import Asset, missing, sha256_of

KNOWN_PROMPTS = ("parti", "coco", "imagenet", "digits")
TEXT = "text:"  # before a prompt that is given itself
PROMPT_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl")
IMAGENET_TEMPLATE = "a photo of a {}"
_COLUMNS = ("prompt", "caption", "text")
_CLASS_COLUMNS = ("class", "label")
_FILE_COLUMNS = ("file_name", "filename")
_SEED_COLUMNS = ("evaluation_seed",)  # of the COCO table: the seed of each prompt's image
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
class PromptSet:
    """Prompts in order. `classes` and `seeds`, where there are any, hold one number per prompt.

    `sha256` is of prompts and classes, whatever file held them. A set that `cycles` goes on from
    its beginning; `template` is what its prompts were made by. `files` are the images that show
    them, where the file tells.
    """

    source: str
    prompts: tuple[str, ...]
    classes: tuple[int, ...] | None = None
    cycles: bool = False
    seeds: tuple[int, ...] | None = None
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
    if source.startswith(TEXT):
        _refuse_column(source, column)
        return PromptSet(source, (source.removeprefix(TEXT),), cycles=True)
    if source in ("digits", "imagenet"):
        _refuse_column(source, column)
        named = DIGIT_CAPTIONS if source == "digits" else _imagenet_prompts()
        template = None if source == "digits" else IMAGENET_TEMPLATE
        return PromptSet(source, named, tuple(range(len(named))), cycles=True, template=template)
    if source in _ASSETS:
        return _of_file(source, _find(_ASSETS[source]), column)
    return _of_file(source, Path(source).expanduser(), column)


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
            f"{prompts.source} holds {count} prompts{each}, -n says {num}; leave -n out, "
            f"give -n {total}, or give a file of as many prompts as you want"
        )
    chosen = range(total if num is None else num)
    order = [i % count if prompts.cycles else i // per_prompt for i in chosen]
    classes = prompts.classes or (None,) * count
    return [(prompts.prompts[index], classes[index]) for index in order]


def _find(asset: Asset) -> Path:
    """The copy of a known set. Raises MissingError saying where to get it and where to put it."""
    path = asset.find()
    if path is None:
        raise missing([asset], "not on this machine")
    if sha256_of(path) != asset.sha256:
        raise ArtifactError(
            f"{path}: expected the {asset.what}, sha256 {asset.sha256}, found another file; "
            f"remove it and fetch {asset.url}"
        )
    return path


def _imagenet_prompts() -> tuple[str, ...]:
    """The class names in the template; importing open_clip loads torch."""
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ImportError as error:
        raise MissingError(
            "the class names of imagenet come with open_clip; install it: "
            "pip install open-clip-torch"
        ) from error
    return tuple(map(IMAGENET_TEMPLATE.format, IMAGENET_CLASSNAMES))


def _of_file(source: str, path: Path, column: str | None) -> PromptSet:
    suffix = path.suffix.lower()
    if not path.exists():
        known = ", ".join(KNOWN_PROMPTS)
        raise MissingError(f"{source}: no such file; prompts are a file or one of {known}")
    if suffix not in PROMPT_SUFFIXES:
        raise ConfigError(f"{source}: prompts are a file in {', '.join(PROMPT_SUFFIXES)}")
    if suffix == ".json":
        return _of_json(source, path, column)
    if suffix != ".txt":
        return _of_table(source, read_text_table(path), column)
    _refuse_column(source, column)
    return _nonempty(source, [line.strip() for line in lines_of(read_text(path)) if line.strip()])


def _refuse_column(source: str, column: str | None) -> None:
    if column is not None:
        raise ConfigError(f"{source} has no columns; leave the prompt column {column!r} out")


def _nonempty(source: str, prompts: Sequence[Any]) -> PromptSet:
    if not prompts:
        raise ArtifactError(f"{source}: the file holds no prompts")
    return PromptSet(source, tuple(prompts))


def _of_table(source: str, table: TextTable, column: str | None) -> PromptSet:
    _nonempty(source, table.rows)
    chosen = table.column(_COLUMNS) if column is None else column
    if chosen is None:
        raise ArtifactError(
            f"{source}: no column {', '.join(_COLUMNS)}; columns: {', '.join(table.columns)}; "
            f"name the one of the prompts with --prompt-column"
        )
    if chosen not in table.columns:
        raise ConfigError(f"{source}: no column {column!r}; columns: {', '.join(table.columns)}")
    prompts = []
    for number, row in enumerate(table.rows, 1):
        prompt = row.get(chosen)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ArtifactError(f"{source}: row {number} has no prompt in column {chosen!r}")
        prompts.append(prompt.strip())
    classes, seeds = _numbers(source, table, _CLASS_COLUMNS), _numbers(source, table, _SEED_COLUMNS)
    files, column = None, table.column(_FILE_COLUMNS)
    if column is not None:
        files = tuple(str(row[column]) if row.get(column) else None for row in table.rows)
    return PromptSet(source, tuple(prompts), classes, seeds=seeds, files=files)


def _numbers(source: str, table: TextTable, names: Sequence[str]) -> tuple[int, ...] | None:
    """A column of whole numbers, one per row; None if there is none, or if it holds words."""
    column = table.column(names)
    if column is None:
        return None
    values = [str(row.get(column)).strip() for row in table.rows]
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


def _of_json(source: str, path: Path, column: str | None) -> PromptSet:
    """Captions of COCO, a list of prompts, or a list of objects."""
    document = parse_json(read_text(path), f"{source}:")
    if isinstance(document, dict) and isinstance(document.get("annotations"), list):
        captions = _coco_captions(source, document["annotations"], column)
        images = [one for one in document.get("images") or () if isinstance(one, dict)]
        names = {image.get("id"): image.get("file_name") for image in images}
        files = tuple(map(names.get, captions)) if names else None
        return replace(_nonempty(source, list(captions.values())), files=files)
    if isinstance(document, list) and all(isinstance(entry, dict) for entry in document):
        return _of_table(source, table_of(path, document), column)
    if isinstance(document, list) and all(isinstance(entry, str) for entry in document):
        _refuse_column(source, column)
        return _nonempty(source, [entry.strip() for entry in document if entry.strip()])
    raise ArtifactError(
        f"{source}: expected COCO captions (an object with `annotations`), or a list of strings or "
        f"of objects"
    )


def _coco_captions(source: str, annotations: Sequence[Any], column: str | None) -> dict[int, str]:
    """By image id in its order, the caption of the lowest annotation id."""
    field = column or "caption"
    first: dict[int, tuple[int, str]] = {}
    for number, entry in enumerate(annotations, 1):
        entry = entry if isinstance(entry, dict) else {}
        if column and column not in entry:
            raise ConfigError(
                f"{source}: annotation {number} has no {column!r}; fields: {', '.join(entry)}"
            )
        image, own, caption = entry.get("image_id"), entry.get("id"), entry.get(field)
        if type(image) is not int or type(own) is not int or not str(caption or "").strip():
            raise ArtifactError(
                f"{source}: annotation {number} is no caption: expected image_id, id and {field}, "
                f"found {', '.join(entry) or 'none of them'}; take the file of captions"
            )
        if image not in first or own < first[image][0]:
            first[image] = (own, str(caption).strip())
    return {image: caption for image, (_, caption) in sorted(first.items())}
