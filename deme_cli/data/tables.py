"""Tables of images, read through the `datasets` library by split: parquet, webdataset, the hub."""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

from deme_cli.data.places import HubDataset, TableFiles
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.hub import offline_reason, stay_offline

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT_NAMES = ("test", "validation", "valid", "val")


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
    """Parquet files or shards. IndexError is how `datasets` says that a shard holds nothing."""
    import datasets

    broken = (datasets.exceptions.DatasetGenerationError, tarfile.TarError, ValueError, IndexError)
    try:
        return datasets.load_dataset(place.kind, data_files=_files_by_split(place))
    except broken as error:
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        raise ArtifactError(f"{place.source}: broken or not {place.kind}: {cause}") from error
    except OSError as error:
        raise MissingError(f"{place.source}: cannot be read: {error}") from error


def _files_by_split(place: TableFiles) -> dict[str, list[str]]:
    """Files by split: those whose name or folder says test or validation are `test`."""
    root = place.path if place.path.is_dir() else place.path.parent
    files: dict[str, list[str]] = {"train": [], "test": []}
    for path in place.files:
        words = re.split(r"[/_.-]", path.relative_to(root).with_suffix("").as_posix().lower())
        is_test = len(place.files) > 1 and not set(HELD_OUT_NAMES).isdisjoint(words)
        files["test" if is_test else "train"].append(str(path))
    if not files["train"]:
        return {"train": files["test"]}
    return {split: paths for split, paths in files.items() if paths}


def held_out_table(tables: Mapping[str, Dataset]) -> str | None:
    """The name of the split that is kept for testing, if the dataset has one beside others."""
    return next((n for n in HELD_OUT_NAMES if n in tables and len(tables) > 1), None)
