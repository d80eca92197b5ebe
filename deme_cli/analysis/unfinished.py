"""What an unfinished analysis has found, so that the same command goes on where it stopped.

Arrays in a hidden safetensors file beside the output, used again only where everything that decides
the result (`identity`) is as it was. While an analysis is open, no other process writes its output,
and signals wait until what was found is saved.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np

from deme_cli.artifacts import fingerprint, load_tensors, write_artifact
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.interrupts import StopRequests
from deme_cli.outputs import claim
from deme_cli.records import Record
from deme_cli.tensor_file import read_header

_KEEP_SECONDS = 30.0  # between two writings


@dataclass(frozen=True)
class Step:
    """`done` of all units of work; `note` once, on what was kept or had to be dropped."""

    done: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class UnfinishedRecord(Record):
    """The header of the hidden file. Not an artifact kind."""

    kind: ClassVar[str] = "unfinished"
    identity: dict[str, Any]


def unfinished_path(output: Path) -> Path:
    """Where an analysis keeps what it has found until its output is written."""
    return output.parent / f".{output.stem}.unfinished"


class Unfinished:
    """The arrays found so far, by name; the analysis changes them in place.

    with Unfinished(output, identity, force=force) as kept:
        values = kept.arrays.setdefault("values", np.full(n, np.nan))
        for ...:
            kept.check()                       # after a signal: saves, raises Stopped
            values[i] = ...
            kept.save_now_and_then()

    identity: whatever JSON holds. `done` says how far it is, as in `3 of 5 buckets`; `note` why
    what lay there is not used. The file stays until `discard`, called once the output is written.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, force: bool = False) -> None:
        self.output, self.path = output, unfinished_path(output)
        self.identity = json.loads(json.dumps(identity))
        self.arrays: dict[str, np.ndarray] = {}
        self.note, self.done = "", "nothing"
        self._force, self._stack = force, ExitStack()

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
        # Finished, closed by a caller that fails to draw it, or short of a process that was killed.
        try:
            if kind is None or issubclass(kind, (GeneratorExit, MissingError)):
                self.save()
        finally:
            self._stack.close()

    def check(self, *progress: int) -> None:
        """After a signal, save and raise Stopped; otherwise nothing."""
        if self._requests.asked:
            self.save()
            raise self._requests.stopped(
                f"stopped after {self.done}; run the same command again to continue"
            )

    def save_now_and_then(self) -> None:
        """Save if the last time is long ago."""
        if time.monotonic() - self._saved > _KEEP_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what was found, whole or not at all."""
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


def discard(output: Path) -> None:
    """Remove what was kept: the output is written."""
    unfinished_path(output).unlink(missing_ok=True)
