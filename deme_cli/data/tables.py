"""Tables of images, read through the `datasets` library by split: parquet, webdataset, the hub."""

from __future__ import annotations

import hashlib
import logging
import tarfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.data.digests import file_digests
from deme_cli.data.places import HELD_OUT_WORDS, HubDataset, TableFiles, is_held_out
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.hub import offline_reason, stay_offline

if TYPE_CHECKING:
    from datasets import Dataset


def read_tables(place: TableFiles | HubDataset) -> Mapping[str, Dataset]:
    """The tables of a parquet file or shard, a folder of them, or a hub dataset, by split name.

    Raises ArtifactError for files that are not what they say, MissingError for what cannot be had.
    """
    if isinstance(place, HubDataset) and offline_reason():
        stay_offline()
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return _read_hub(place) if isinstance(place, HubDataset) else _read_files(place)


def _read_hub(place: HubDataset) -> Mapping[str, Dataset]:
    import datasets

    try:
        return datasets.load_dataset(place.hub_id)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise MissingError(
            f"{place.source}: {place.hub_id} cannot be had from the hub: {error}; "
            f"give a folder of images or a parquet file instead"
        ) from error


def _read_files(place: TableFiles) -> Mapping[str, Dataset]:
    """Parquet files or shards. IndexError is how `datasets` says that a shard holds nothing.

    `datasets` keeps tables it has read by the times of their files; the name it is given here is of
    their bytes.
    """
    import datasets

    root = place.path if place.path.is_dir() else place.path.parent
    digests = file_digests(root, place.files).values()
    name = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    broken = (datasets.exceptions.DatasetGenerationError, tarfile.TarError, ValueError, IndexError)
    try:
        tables = datasets.load_dataset(place.kind, name, data_files=_files_by_split(place))
    except broken as error:
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        raise ArtifactError(f"{place.source}: broken or not {place.kind}: {cause}") from error
    except OSError as error:
        raise MissingError(f"{place.source}: cannot be read: {error}") from error
    return {name: _downloaded(place.source, table) for name, table in tables.items()}


def _downloaded(source: str, table: Dataset) -> Dataset:
    """The rows without those that img2dataset could not download, which it keeps in its tables."""
    if not {"key", "status", "url"} <= set(table.column_names):
        return table
    kept = [index for index, status in enumerate(table["status"]) if status == "success"]
    if kept and len(kept) < len(table):
        failed = len(table) - len(kept)
        console.note_once(f"{source}: left out are {failed} images that were not downloaded")
    return table.select(kept) if kept else table


def _files_by_split(place: TableFiles) -> dict[str, list[str]]:
    """Files by split: those whose name or folder says test or validation are `test`."""
    root = place.path if place.path.is_dir() else place.path.parent
    files: dict[str, list[str]] = {"train": [], "test": []}
    for path in place.files:
        held_out = len(place.files) > 1 and is_held_out(path.relative_to(root))
        files["test" if held_out else "train"].append(str(path))
    if not files["train"]:
        return {"train": files["test"]}
    return {split: paths for split, paths in files.items() if paths}


def held_out_tables(tables: Mapping[str, Dataset]) -> set[str]:
    """The names of the splits that are kept for testing, if the dataset has some beside others."""
    held_out = {name for name in tables if name in HELD_OUT_WORDS}
    return held_out if len(held_out) < len(tables) else set()
