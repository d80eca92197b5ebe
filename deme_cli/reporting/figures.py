"""The figures of `deme analyze` with their readings, sample grids with their prompts, and pictures
that belong to neither."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_cli.analysis.result import SCHEMA_VERSION
from deme_cli.analysis.settings import ANALYSES
from deme_cli.artifacts import SamplesRecord
from deme_cli.errors import ArtifactError
from deme_cli.reporting.folder import CARD_NAME, Folder, read_text
from deme_cli.reporting.pictures import Picture, read_picture
from deme_cli.reporting.searches import SEARCH_PICTURES
from deme_cli.reporting.tables import Card, Field, flatten
from deme_cli.sampling.preview import MAX_IMAGES, preview_path

_MOST_OTHERS = 12
_DAMAGED = (ArtifactError, OSError, LookupError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True)
class Figure:
    """A picture (None where it is missing), what it says, and the card below it."""

    name: str
    title: str
    reading: str
    picture: Picture | None
    card: Card | None = None
    prompts: list[str] = field(default_factory=list)
    classes: str = ""


def open_picture(folder: Folder, path: Path) -> Picture | None:
    """A picture of the folder; None, with a note, where it is none."""
    try:
        return read_picture(path)
    except (ArtifactError, OSError) as error:
        folder.give_up(path.name, error)
        return None


def analyses(folder: Folder) -> list[Figure]:
    """A figure for each document of an analysis, in the order of the paper."""
    found = []
    for name, document in folder.documents.items():
        kind = document.get("kind")
        if not isinstance(kind, str) or "schema_version" not in document:
            continue
        if document["schema_version"] != SCHEMA_VERSION:
            folder.give_up(name, ArtifactError(
                f"schema_version {document['schema_version']!r}, this deme reads {SCHEMA_VERSION}"
            ))  # fmt: skip
            continue
        place = [*ANALYSES].index(kind) if kind in ANALYSES else len(ANALYSES)
        found.append((place, name, _analysis(folder, name, kind, document)))
    return [figure for *_, figure in sorted(found, key=lambda one: one[:2])]


def _analysis(folder: Folder, name: str, kind: str, document: Mapping[str, Any]) -> Figure:
    path = folder.pictures.get(name.removesuffix(".json") + ".png")
    picture = open_picture(folder, path) if path else None
    protocol = document.get("protocol")
    protocol = protocol if isinstance(protocol, Mapping) else {}
    reading = str(document.get("reading") or f"Written by deme analyze {kind}")
    card = Card("Protocol", [Field(key, text) for key, text in flatten(protocol)])
    return Figure(name, kind.replace("-", " ").capitalize(), reading, picture, card)


def samples(folder: Folder) -> list[Figure]:
    """A grid for each artifact of samples and each folder of images."""
    found = []
    for artifact, record in folder.of(SamplesRecord):
        found.append(_grid(folder, artifact.path, record.protocol, record.prompts, record.classes))
    for path in folder.image_folders:
        try:
            protocol = json.loads(read_text(path / CARD_NAME))["protocol"]
            card = dict(protocol)
        except _DAMAGED as error:
            folder.give_up(f"{path.name}/{CARD_NAME}", error)
            continue
        prompts, classes = _subjects(path)
        found.append(_grid(folder, path, card, prompts, classes))
    return found


def _grid(
    folder: Folder, path: Path, protocol: Mapping[str, Any], prompts: list[Any] | None,
    classes: list[Any] | None,
) -> Figure:  # fmt: skip
    preview = folder.pictures.get(preview_path(path).name)
    picture = open_picture(folder, preview) if preview else None
    texts = dict(flatten(protocol))
    shown = [str(prompt) for prompt in (prompts or [])[:MAX_IMAGES]]
    told = ", ".join(map(str, (classes or [])[:MAX_IMAGES]))
    names = {artifact.record.fingerprint: artifact.stem for artifact in folder.artifacts}
    model = names.get(texts.get("fingerprints", ""), texts.get("model", "a model"))
    what = f"{texts.get('num', 'some')} images of {model}"
    how = f"{texts.get('sampler', '?')}, {texts.get('steps', '?')} steps"
    guidance = texts.get("guidance", "none")
    how += "" if guidance == "none" else f", guidance {guidance}"
    reading = f"{what}: {how}, seed {texts.get('seed', '?')}"
    card = Card("Protocol", [Field(name, text) for name, text in texts.items()])
    title = path.name.removesuffix(".safetensors")
    return Figure(path.name, title, reading, picture, card, shown, told)


def _subjects(path: Path) -> tuple[list[Any] | None, list[Any] | None]:
    """Prompts and classes in order of the images of a folder, where it has any."""
    place = path / "metadata.jsonl"
    try:
        rows = [json.loads(line) for line in read_text(place).split("\n") if line]
        rows = sorted(rows, key=lambda row: str(row["file_name"]))
        return _entries(rows, "text"), _entries(rows, "label")
    except _DAMAGED:
        return None, None


def _entries(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any] | None:
    """What the rows say of `key`, None unless all of them do."""
    return [row[key] for row in rows] if rows and all(key in row for row in rows) else None


def share_noise(folder: Folder) -> bool:
    """Whether image i of every grid began with the same noise: all have one seed."""
    records = [record for _, record in folder.of(SamplesRecord)]
    seeds = {str(record.protocol.get("seed")) for record in records}
    return len(records) > 1 and len(seeds) == 1 and not folder.image_folders


def other_pictures(folder: Folder) -> Iterator[Figure]:
    """PNG files that nothing else has shown, the picture of `deme demo` or `compare` first."""
    shown = _claimed(folder)
    left = [name for name in folder.pictures if name not in shown]
    left.sort(key=lambda name: (name not in ("compare.png", "demo.png"), name))
    for name in left[:_MOST_OTHERS]:
        if picture := open_picture(folder, folder.pictures[name]):
            yield Figure(name, name, _made_by(name), picture)
    for name in left[_MOST_OTHERS:]:
        folder.give_up(name, ArtifactError(f"one of {len(left)} other pictures, not shown"))


def _made_by(name: str) -> str:
    command = {"compare.png": "deme compare", "demo.png": "deme demo"}.get(name)
    if command:
        return f"The picture that {command} draws of its table"
    return f"The picture {name} of this folder"


def _claimed(folder: Folder) -> set[str]:
    """Names of the pictures that belong to an analysis, a grid or a search."""
    kinds = {name for name, document in folder.documents.items() if "kind" in document}
    names = {name.removesuffix(".json") + ".png" for name in kinds}
    names |= {preview_path(artifact.path).name for artifact, _ in folder.of(SamplesRecord)}
    names |= {preview_path(path).name for path in folder.image_folders}
    return names | {name for name in folder.pictures if name.endswith(SEARCH_PICTURES)}
