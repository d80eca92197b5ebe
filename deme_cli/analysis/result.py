"""What every analysis does around its measuring: checks, progress, what is kept, its files.

An analysis is a function `analyze_…` in a file of its own. It checks first what headers and
settings tell, measures, draws, and writes a JSON file with the pictures beside it. Every document
has `schema_version`, `kind`, `reading` (a headline) and `protocol`; the rest is its own.
What was measured lies in a hidden file beside the output until that is written, so that the same
call goes on where it stopped. Needs no torch before something is measured.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np

from deme_cli.analysis.settings import SPLITS
from deme_cli.artifacts import Record, fingerprint, load_tensors, write_artifact
from deme_cli.config import DataConfig
from deme_cli.errors import ArtifactError, ConfigError, DemeError, MissingError
from deme_cli.files import read_header, require_output, write_whole
from deme_cli.jobs import StopRequests, claim
from deme_cli.run_file import RunFile

SCHEMA_VERSION = 1
_KEEP_SECONDS = 30.0  # between two writings of what is kept


@dataclass(frozen=True)
class Analysis:
    """What an analysis measured: its file, the pictures of it, a headline and a table.

    document: what the file holds.   facts: what `deme analyze … --json` tells of it.   After a dry
    run all but `path` and `facts` is empty.
    """

    path: Path
    pictures: Sequence[Path] = ()
    reading: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """The files that were written."""
        return [self.path, *self.pictures] if self.document else []


def check_output(output: Path, *, force: bool) -> None:
    """Check that the output is free or `force`; its pictures are drawn over."""
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: expected a name that ends in .json")
    require_output(output, force=force)
    for picture in _pictures(output):
        require_output(picture, force=True)


def check_images(images: DataConfig | None, run: RunFile, *, split: str) -> DataConfig:
    """Which images are looked at, those of `run` if None; found before torch is imported."""
    from deme_cli.data.image_source import find_image_source

    if split not in SPLITS:
        raise ConfigError(f"--split {split}: expected one of {', '.join(SPLITS)}")
    images = images or run.settings(DataConfig)
    if not images.source:
        raise ConfigError("no images: set [data] source in deme.toml, or use --data")
    find_image_source(images.source)
    return images


def own_base(run: RunFile) -> str:
    """The base of deme.toml. Raises MissingError where there is none."""
    if not run.base.exists():
        raise MissingError(
            f"{run.base}: no base there; name a MODEL, or make a base with `deme split`"
        )
    return str(run.base)


def document_bytes(kind: str, document: Mapping[str, Any]) -> bytes:
    """The document as JSON, one line per row of a table; what is not finite becomes null."""
    whole = {"schema_version": SCHEMA_VERSION, "kind": kind, **document}
    lines = ",\n".join(f"  {json.dumps(name)}: {_text(plain(v))}" for name, v in whole.items())
    return f"{{\n{lines}\n}}\n".encode()


def plain(value: Any) -> Any:
    """`value` in JSON's own types: numpy as lists, what is not finite as null, paths as texts."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, type(None))) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    return json.dumps(value)


def _pictures(output: Path) -> list[Path]:
    return [output.with_suffix(suffix) for suffix in (".png", ".svg")]


def write_analysis(
    kept: Unfinished, drawn: Sequence[bytes], document: bytes, *, shown: Sequence[str],
    columns: Sequence[str], rows: Sequence[Sequence[str]], **more: Any,
) -> Analysis:  # fmt: skip
    """Write the pictures, then the file, which says that all is done; what was kept goes.

    `shown` of the document, and `more`, are its facts.
    """
    output, written = kept.output, json.loads(document)
    pictures = _pictures(output)
    for picture, one in zip(pictures, drawn, strict=True):
        write_whole(picture, [one])
    write_whole(output, [document])
    kept.path.unlink(missing_ok=True)
    facts = {name: written[name] for name in shown if name in written} | more
    return Analysis(output, pictures, written["reading"], columns, rows, written, facts)


@dataclass(frozen=True, kw_only=True)
class UnfinishedRecord(Record):
    """The header of the hidden file. Not an artifact kind."""

    kind: ClassVar[str] = "unfinished"
    identity: dict[str, Any]


def unfinished_path(output: Path) -> Path:
    """Where an analysis keeps what it has measured until its output is written."""
    return output.parent / f".{output.stem}.unfinished"


class Unfinished:
    """The arrays measured so far, by name; the analysis changes them in place.

    with Unfinished(output, identity, force=force) as kept:
        values = kept.arrays.setdefault("values", np.full(n, np.nan))
        for ...:
            check = kept.checker("3 of 5 buckets")
            values[i] = ...                    # with check() in between

    identity: all that decides the result, as JSON holds it; arrays of another are not used, and
    `note` says why. Meanwhile no other process writes the output.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], *, force: bool = False) -> None:
        self.output, self.path = output, unfinished_path(output)
        self.identity = json.loads(json.dumps(identity))
        self.arrays: dict[str, np.ndarray] = {}
        self.note, self._force, self._stack = "", force, ExitStack()

    def __enter__(self) -> Unfinished:
        self._stack.enter_context(claim(self.output))
        self._requests = self._stack.enter_context(StopRequests())
        self._saved = time.monotonic()
        if self._force:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            self._restore()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if kind is not None and not issubclass(kind, DemeError):  # a picture that fails
                self.save()
        finally:
            self._stack.close()

    def checker(self, done: str) -> Callable[..., None]:
        """What to call between units of work, with `done` of it behind: it saves now and then, and
        after a signal saves and raises Stopped."""

        def check(*progress: int) -> None:
            if self._requests.asked:
                self.save()
                raise self._requests.stopped(
                    f"stopped after {done}; run the same command again to continue"
                )
            if time.monotonic() - self._saved > _KEEP_SECONDS:
                self.save()

        return check

    def save(self) -> None:
        """Write what was measured, whole or not at all."""
        if self.arrays:
            write_artifact(self.path, self.arrays, UnfinishedRecord(identity=self.identity))
        self._saved = time.monotonic()

    def _restore(self) -> None:
        try:
            record = json.loads(read_header(self.path).metadata.get("deme", "{}"))
            tensors = load_tensors(self.path)
            if fingerprint(tensors) != record.get("fingerprint"):
                raise ArtifactError(f"{self.path}: damaged")
            kept = record["identity"]
        except (ArtifactError, ValueError, KeyError):
            self.note = "what was measured before cannot be read; measuring all of it anew"
            return
        names = self.identity.keys() | kept.keys()
        if changed := sorted(n for n in names if kept.get(n) != self.identity.get(n)):
            self.note = (
                f"what was measured before had another {', '.join(changed)}; measuring all of it "
                f"anew"
            )
            return
        self.arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
