"""What lies in a run folder: artifacts, JSON documents, pictures, curves, journals of searches.

Only the folder itself is read; of folders below it, that they hold artifacts. What cannot be read
is told with its reason and never ends the work. Links that lead out of the folder are passed over,
so is whatever is no plain file. Needs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from deme_cli.artifacts import ExpertRecord, Record, record_of
from deme_cli.errors import ArtifactError, DemeError, MissingError, reading
from deme_cli.files import read_header

METRICS, JOURNAL = ".metrics.jsonl", ".trials.jsonl"
CARD_NAME = "samples.json"  # of a folder of images; where it is written, torch is loaded
MAX_BYTES = 1 << 26  # of a JSON document or a curve
_MAX_BELOW = 1000  # folders looked through for artifacts
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Artifact:
    """A safetensors file that deme wrote: its record, and what it holds."""

    path: Path
    record: Record
    num_parameters: int
    num_bytes: int

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stem(self) -> str:
        return self.path.name.removesuffix(".safetensors")


@dataclass(frozen=True)
class Unread:
    """A file that is there and does not appear, and why."""

    name: str
    reason: str


@dataclass
class Folder:
    """Everything found, each list in order of names. `below`: artifacts by folder further down."""

    path: Path
    artifacts: list[Artifact] = field(default_factory=list)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)  # by file name
    pictures: dict[str, Path] = field(default_factory=dict)  # PNG files by name
    metrics: list[Path] = field(default_factory=list)
    journals: list[Path] = field(default_factory=list)
    image_folders: list[Path] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    below: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.resolve().name or "/"

    def of(self, *kinds: type[R]) -> list[tuple[Artifact, R]]:
        """The artifacts whose records are of these kinds, with their records."""
        return [
            (artifact, record)
            for artifact in self.artifacts
            if isinstance(record := artifact.record, kinds) and type(record) in kinds
        ]

    def give_up(self, name: str, error: Exception) -> None:
        """Note that a file does not appear."""
        self.unread.append(Unread(name, reason_of(error, self.path / name)))


def is_whole(record: ExpertRecord) -> bool:
    """Whether an expert was finetuned on all of [0, T): one network, as the base is."""
    return len(record.timesteps) == record.num_train_timesteps


def reason_of(error: Exception, path: Path) -> str:
    """What an error says of a file, without the file's place."""
    text = str(error).removeprefix(f"{path}: ").replace(str(path), path.name)
    return " ".join(text.split()) or type(error).__name__


def open_folder(path: Path) -> Folder:
    """Look through a folder. Raises MissingError if it is not there or holds nothing of deme's."""
    if not path.is_dir():
        what = "is a file, not a run folder" if path.exists() else "no such folder"
        raise MissingError(f"{path}: {what}; name the folder that deme worked in")
    folder = Folder(path)
    with reading(path):
        for entry in sorted(path.iterdir()):
            if not entry.name.startswith("."):
                _take(folder, entry)
    folder.below = dict(_artifacts_below(path))
    found = folder.artifacts or folder.metrics or folder.journals or folder.image_folders
    if not found and not any(map(is_ours, folder.documents.values())):
        raise MissingError(f"{path}: nothing of deme's here{_elsewhere(folder)}")
    return folder


def is_ours(document: dict[str, Any]) -> bool:
    """Whether a JSON document is a table, a comparison or an analysis."""
    return "schema_version" in document and ("rows" in document or "kind" in document)


def _elsewhere(folder: Folder) -> str:
    if folder.below:
        return f", but in {folder.path / next(iter(folder.below))}; name a folder with artifacts"
    if folder.unread:
        return f" that can be read ({folder.unread[0].name}: {folder.unread[0].reason})"
    return "; a run begins with `deme split digits -n 4`, or run `deme demo`"


def _take(folder: Folder, entry: Path) -> None:
    """Put one entry of the folder where it belongs."""
    name = entry.name
    target = Path(os.path.realpath(entry))  # which, unlike resolve, bears links in a circle
    if entry.is_symlink() and not target.is_relative_to(folder.path.resolve()):
        if entry.suffix in (".safetensors", ".json", ".jsonl", ".png"):
            folder.unread.append(Unread(name, "a link that leads out of the folder"))
    elif entry.is_dir():
        if (entry / CARD_NAME).is_file():
            folder.image_folders.append(entry)
    elif not entry.is_file():
        return  # a pipe or a device would keep us waiting
    elif entry.suffix == ".safetensors":
        _take_artifact(folder, entry)
    elif entry.suffix == ".json":
        _take_document(folder, entry)
    elif entry.suffix == ".png":
        folder.pictures[name] = entry
    elif name.endswith(METRICS):
        folder.metrics.append(entry)
    elif name.endswith(JOURNAL):
        folder.journals.append(entry)


def _take_artifact(folder: Folder, path: Path) -> None:
    try:
        header = read_header(path)
        found = Artifact(path, record_of(header), header.num_parameters, path.stat().st_size)
    except (DemeError, OSError) as error:
        folder.give_up(path.name, error)
    else:
        folder.artifacts.append(found)


def _take_document(folder: Folder, path: Path) -> None:
    try:
        document = json.loads(read_text(path))
        json.dumps(document)  # what is nested too deeply to be shown fails here
    except (ArtifactError, OSError) as error:
        folder.give_up(path.name, error)
    except (ValueError, RecursionError) as error:
        folder.unread.append(Unread(path.name, f"not valid JSON ({error})"))
    else:
        if isinstance(document, dict):
            folder.documents[path.name] = document


def read_text(path: Path) -> str:
    """The text of a file, what is no UTF-8 in it replaced. Raises ArtifactError if it is huge."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ArtifactError(f"{path}: {size:,} bytes, more than a report reads ({MAX_BYTES:,})")
    return path.read_text(encoding="utf-8", errors="replace")


def _artifacts_below(path: Path) -> Iterator[tuple[str, int]]:
    """Folders under `path` and how many artifacts lie in each, in order of names."""
    for here, folders, files in islice(os.walk(path), _MAX_BELOW):  # does not follow links
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        count = sum(f.endswith(".safetensors") and not f.startswith(".") for f in files)
        if count and Path(here) != path:
            yield str(Path(here).relative_to(path)), count
