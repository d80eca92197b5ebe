"""Tables of images, read through the `datasets` library by split: parquet, webdataset, the hub.

Captions and classes are columns; shards of webdataset hold text in `txt` and anything in `json`,
whose fields count as columns too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.data.captions import CALLED, COLUMNS, JSON_FIELDS, NoAnnotations, RawAnnotations
from deme_cli.data.digests import file_digests
from deme_cli.data.image_source import (
    HELD_OUT_WORDS,
    ImageSource,
    image_suffixes,
    is_held_out,
)
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.fetch import offline_reason, stay_offline

if TYPE_CHECKING:
    from datasets import Dataset

_FIELDS = ("txt", "json", "cls")  # of a sample in a shard


def read_tables(source: ImageSource) -> Mapping[str, Dataset]:
    """The tables of a parquet file or shard, a folder of them, or a hub dataset, by split name.

    Raises ArtifactError for files that are not what they say, MissingError for what cannot be had.
    """
    if source.kind == "hub" and offline_reason():
        stay_offline()
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return _read_hub(source) if source.kind == "hub" else _read_files(source)


def _read_hub(source: ImageSource) -> Mapping[str, Dataset]:
    import datasets

    try:
        return datasets.load_dataset(source.hub_id)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise MissingError(
            f"{source.name}: {source.hub_id} cannot be had from the hub: {error}; "
            f"give a folder of images or a parquet file instead"
        ) from error


def _read_files(source: ImageSource) -> Mapping[str, Dataset]:
    """Parquet files or shards.

    `datasets` keeps tables it has read by the times of their files; the name it is given here is of
    their bytes.
    """
    import datasets

    root = source.path if source.path.is_dir() else source.path.parent
    digests = file_digests(root, source.files).values()
    name = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    broken = (datasets.exceptions.DatasetGenerationError, tarfile.TarError, ValueError)
    try:
        if source.kind == "webdataset":
            return _read_shards(_files_by_split(source), name)
        tables = datasets.load_dataset(source.kind, name, data_files=_files_by_split(source))
    except broken as error:
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        raise ArtifactError(f"{source.name}: broken or not {source.kind}: {cause}") from error
    except OSError as error:
        raise MissingError(f"{source.name}: cannot be read: {error}") from error
    return {name: _downloaded(source.name, table) for name, table in tables.items()}


def _read_shards(files: Mapping[str, list[str]], name: str) -> Mapping[str, Dataset]:
    """Shards of webdataset, by split: columns image, and of txt, json and cls what there is.

    `datasets` itself takes the first samples for all: it refuses a field that is null there and
    text later, and shards whose samples lack a field.
    """
    import datasets

    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), **dict.fromkeys(_FIELDS, text)})
    tables = {
        split: datasets.Dataset.from_generator(
            _samples, features, gen_kwargs={"shards": shards, "name": name}
        )
        for split, shards in files.items()
    }
    absent = [
        field for field in _FIELDS
        if all(table.data.column(field).null_count == len(table) for table in tables.values())
    ]  # fmt: skip
    return {split: table.remove_columns(absent) for split, table in tables.items()}


def _samples(shards: Sequence[str], name: str) -> Iterator[dict[str, Any]]:
    """Samples of shards: files that follow each other and agree up to the first dot.

    name: of the bytes of the shards, by which `datasets` tells samples it has kept.
    """
    has_images = False
    for shard in shards:
        with tarfile.open(shard) as archive:
            for _, members in groupby(filter(_is_shown, archive), key=_key):
                sample = _sample(archive, members)
                if any(sample.get(field) for field in ("image", "txt", "cls")):
                    has_images = True
                    yield dict.fromkeys(("image", *_FIELDS)) | sample
    if not has_images:
        raise ValueError("no images")


def _is_shown(member: tarfile.TarInfo) -> bool:
    return member.isfile() and not PurePosixPath(member.name).name.startswith(".")


def _key(member: tarfile.TarInfo) -> tuple[PurePosixPath, str]:
    path = PurePosixPath(member.name)
    return path.parent, path.name.split(".")[0]


def _sample(archive: tarfile.TarFile, members: Iterable[tarfile.TarInfo]) -> dict[str, Any]:
    """The image and the text of one sample. Of several images it is the one of fewest dots."""
    sample: dict[str, Any] = {}
    dots = sys.maxsize
    for member in members:
        kind = PurePosixPath(member.name).suffix.lower()
        field = "txt" if kind in (".text", ".caption") else kind[1:]
        if kind in image_suffixes() and member.name.count(".") < dots:
            dots = member.name.count(".")
            sample["image"] = {"bytes": _read(archive, member), "path": None}
        elif field in _FIELDS and field not in sample:
            try:
                sample[field] = _read(archive, member).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{member.name} is not UTF-8 text") from error
    return sample


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "a plain file"
    return file.read()


def _downloaded(source: str, table: Dataset) -> Dataset:
    """The rows without those that img2dataset could not download, which it keeps in its tables."""
    if not {"key", "status", "url"} <= set(table.column_names):
        return table
    kept = [index for index, status in enumerate(table["status"]) if status == "success"]
    if kept and len(kept) < len(table):
        failed = len(table) - len(kept)
        console.note_once(f"{source}: left out are {failed} images that were not downloaded")
    return table.select(kept) if kept else table


def _files_by_split(source: ImageSource) -> dict[str, list[str]]:
    """Files by split: those whose name or folder says test or validation are `test`."""
    root = source.path if source.path.is_dir() else source.path.parent
    files: dict[str, list[str]] = {"train": [], "test": []}
    for path in source.files:
        held_out = len(source.files) > 1 and is_held_out(path.relative_to(root))
        files["test" if held_out else "train"].append(str(path))
    if not files["train"]:
        return {"train": files["test"]}
    return {split: paths for split, paths in files.items() if paths}


def held_out_tables(tables: Mapping[str, Dataset]) -> set[str]:
    """The names of the splits that are kept for testing, if the dataset has some beside others."""
    held_out = {name for name in tables if name in HELD_OUT_WORDS}
    return held_out if len(held_out) < len(tables) else set()


# columns


def table_annotations(
    label: str, rows: Dataset, splits: Sequence[Dataset], *, wants: str, column: str | None
) -> RawAnnotations:
    """The captions (wants `text`) or classes (wants `class`) of the rows; `label` in messages.

    splits: tables whose classes are counted, too. Raises ArtifactError naming the columns there are
    if none serves.
    """
    name, key = _find_column(label, rows, wants, column)
    where = f"column {name!r}" if key is None else f"field {key!r} of column {name!r}"
    values = _column_values(rows, name, key)
    if wants == "text":
        return RawAnnotations(values, where)
    names = getattr(rows.features[name], "names", None) or ()  # of a ClassLabel
    others = [table for table in splits if name in table.features and not names]
    classes = [value for table in others for value in _column_values(table, name, key)]
    return RawAnnotations(values, where, classes, names)


def _find_column(
    label: str, rows: Dataset, wants: str, column: str | None
) -> tuple[str, str | None]:
    """The column, and the field within it where it is the `json` of a shard."""
    from datasets import Image

    names, keys = [column or ""], [column or ""]
    if column is None:
        names = [*COLUMNS[wants], *(["txt"] if wants == "text" else [])]
        keys = list(JSON_FIELDS[wants])
    for name in names:
        if name in rows.features and not isinstance(rows.features[name], Image):
            return name, None
    fields = _json_fields(rows)
    for key in keys:
        if key in fields:
            return "json", key
    within = f"; fields of json: {', '.join(fields)}" if fields else ""
    raise NoAnnotations(
        f"{label}: no column {' or '.join(names)} for the {CALLED[wants]}; "
        f"columns: {', '.join(rows.features)}{within}"
    )


def _json_fields(rows: Dataset) -> Sequence[str]:
    """The fields of the `json` column: declared, or those of its first rows."""
    kind = rows.features.get("json")
    if isinstance(kind, Mapping):
        return tuple(kind)
    first = rows.select_columns(["json"])[:5]["json"] if kind is not None else ()
    return tuple(dict.fromkeys(key for row in map(_json_object, first) for key in row))


def _column_values(rows: Dataset, name: str, key: str | None) -> list[Any]:
    """The values of a column, or of a field of its JSON; no other column is read."""
    values: list[Any] = []
    for batch in rows.select_columns([name]).iter(batch_size=10_000):
        values += batch[name]
    return values if key is None else [_json_object(value).get(key) for value in values]


def _json_object(value: Any) -> dict[str, Any]:
    """An object of JSON, read or still text; empty where it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            value = None
    return value if isinstance(value, dict) else {}
