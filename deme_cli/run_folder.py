"""What lies in a run folder: artifacts, JSON documents, pictures, curves, journals of searches.

Only the folder itself is read. What cannot be read is told with its reason and never ends the work;
links that lead out of the folder are passed over, so is whatever is no plain file. Needs no torch.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_cli.artifacts import Record, record_of
from deme_cli.errors import ArtifactError, DemeError, MissingError, reading
from deme_cli.files import read_header
from deme_cli.inspection import Inspected, inspect

METRICS, JOURNAL = ".metrics.jsonl", ".trials.jsonl"
CARD_NAME = "samples.json"  # of a folder of images
_MAX_BYTES = 1 << 26  # of a JSON document or a curve
_MAX_PIXELS = 100_000_000  # of a picture
DAMAGED = (
    DemeError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip


@dataclass
class Folder:
    """What lies in a run folder, in order of names."""

    path: Path
    artifacts: list[tuple[Path, Record]] = field(default_factory=list)
    exports: list[Inspected] = field(default_factory=list)  # of one file
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)  # pictures, curves, journals by name
    image_folders: list[Path] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    def of(self, kind: type[Record]) -> list[tuple[Path, Any]]:
        """The artifacts whose record is of this kind itself."""
        return [(path, record) for path, record in self.artifacts if type(record) is kind]

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Note a file that cannot be shown, and go on."""
        try:
            yield
        except DAMAGED as error:
            text = str(error) if isinstance(error, (DemeError, OSError)) else f"damaged ({error!r})"
            path = self.path / name
            text = text.removeprefix(f"{path}: ").replace(str(path), name).removeprefix(f"{name}: ")
            self.unread[name] = " ".join(text.split())


def open_folder(path: Path) -> Folder:
    """Look through a folder. Raises MissingError if it is not there or holds nothing of deme's."""
    if not path.is_dir():
        what = "is a file, not a run folder" if path.exists() else "no such folder"
        raise MissingError(f"{path}: {what}; name the folder that deme worked in")
    folder, inside = Folder(path), path.resolve()
    with reading(path):
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        name = entry.name
        if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(inside):
            if entry.suffix in (".safetensors", ".json", ".jsonl", ".png"):
                folder.unread[name] = "a link that leads out of the folder"
        elif entry.is_dir():
            folder.image_folders += [entry] if (entry / CARD_NAME).is_file() else []
        elif not entry.is_file():
            continue  # a pipe or a device would keep us waiting
        elif entry.suffix == ".safetensors":
            with folder.noting(name):
                (found,) = inspect([entry])
                if found.made_of:
                    folder.exports.append(found)
                else:
                    folder.artifacts.append((entry, found.record or record_of(read_header(entry))))
        elif entry.suffix == ".json":
            with folder.noting(name):
                document = json.loads(text_of(entry))
                json.dumps(document)  # what is nested too deeply to be shown fails here
                folder.documents |= {name: document} if isinstance(document, dict) else {}
        elif entry.suffix == ".png" or name.endswith((METRICS, JOURNAL)):
            folder.files[name] = entry
    ours = any("rows" in d or "kind" in d for d in folder.documents.values() if is_current(d))
    lines = any(name.endswith((METRICS, JOURNAL)) for name in folder.files)
    if not (folder.artifacts or folder.exports or ours or lines or folder.image_folders):
        told = [f" that can be read ({name}: {why})" for name, why in folder.unread.items()]
        begin = "; a run begins with `deme split digits -n 4`, or run `deme demo`"
        raise MissingError(f"{path}: nothing of deme's here{(*told, begin)[0]}")
    return folder


def is_current(document: Mapping[str, Any]) -> bool:
    return document.get("schema_version") == 1


def text_of(path: Path) -> str:
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ArtifactError(f"{path}: {size:,} bytes, more than a report reads ({_MAX_BYTES:,})")
    return path.read_text(encoding="utf-8", errors="replace")


def picture_of(folder: Folder, name: str) -> dict[str, Any] | None:
    """A PNG file of the folder as a data URI, decoded once to be sure of it; None where it is not
    there, or with a note where it cannot be shown."""
    from PIL import Image

    if name not in folder.files:
        return None
    try:
        data = folder.files[name].read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height <= _MAX_PIXELS:
                image.load()
                return embedded(name, data, image.size)
            folder.unread[name] = f"{image.width} x {image.height} pixels, too many"
    except (SyntaxError, ValueError, OSError, Image.DecompressionBombError):
        folder.unread[name] = "not a whole PNG file"
    return None


def embedded(name: str, data: bytes, size: tuple[int, int]) -> dict[str, Any]:
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"name": name, "uri": uri, "width": size[0], "height": size[1]}
