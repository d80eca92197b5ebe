"""The log of a search: one JSON line per trial beside the output, so that a search can go on.

The first line says what was searched; trials of anything else are never mixed in. A line torn by a
kill is dropped, and the last line names the merged file once it is written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_cli.errors import ConfigError, NumericsError, writing
from deme_cli.outputs import write_whole


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate: its coefficients and its objective (inf where that was not finite).

    `best` is the least objective so far, this one included.
    """

    index: int
    coefficients: tuple[float, ...]
    objective: float
    best: float


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """From best to worst: by objective, then by the norm of the coefficients, then by number.

    Raises NumericsError where no objective is finite.
    """
    if not any(math.isfinite(trial.objective) for trial in trials):
        raise NumericsError(
            "the objective is not finite for any candidate; look for NaN in the experts, "
            "or use --dtype fp32"
        )
    return sorted(trials, key=lambda t: (t.objective, math.hypot(*t.coefficients), t.index))


class TrialLog:
    """Objectives by the number of the trial, kept in a file as they come."""

    def __init__(self, path: Path, search: dict[str, Any]) -> None:
        self.path, self.search = path, json.loads(json.dumps(search))
        self.values: list[float] = []

    def open(self, points: Sequence[Sequence[float]], *, force: bool) -> None:
        """Take over the trials of an earlier run of this search, or begin a new log.

        A finished search is repeated only with `force`, which also replaces the log of another one.
        Raises ConfigError where the log belongs to another search.
        """
        lines = self._lines()
        ours = bool(lines) and lines[0].get("search") == self.search
        if lines and not ours and not force:
            raise ConfigError(
                f"{self.path} holds the trials of another search (other experts, grid, objective "
                f"or settings); add --force to start anew, or choose another --output"
            )
        finished = bool(lines) and "merged" in lines[-1]
        if ours and not (finished and force):
            self.values = _values(lines[1:], points)
        kept = [self._line(index, points[index]) for index in range(len(self.values))]
        head = json.dumps({"search": self.search})
        write_whole(self.path, [f"{line}\n".encode() for line in (head, *kept)])

    def add(self, coefficients: Sequence[float], value: float) -> None:
        """Append the next trial; it is on the disk when this returns."""
        self.values.append(value)
        self._append(self._line(len(self.values) - 1, coefficients))

    def finish(self, fingerprint: str) -> None:
        """Note that the merged file was written."""
        self._append(json.dumps({"merged": fingerprint}))

    def _line(self, index: int, coefficients: Sequence[float]) -> str:
        value = self.values[index]
        objective = value if math.isfinite(value) else None
        entry = {"index": index, "coefficients": list(coefficients), "objective": objective}
        return json.dumps(entry)

    def _append(self, line: str) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[dict[str, Any]]:
        """The lines of the file up to the first that is torn."""
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break
            if not isinstance(line, dict):
                break
            lines.append(line)
        return lines or [{}]


def _values(lines: Sequence[dict[str, Any]], points: Sequence[Sequence[float]]) -> list[float]:
    """Objectives of the logged trials that are the first of `points`."""
    values = []
    for line, point in zip(lines, points, strict=False):
        if line.get("coefficients") != list(point) or "objective" not in line:
            break
        value = line["objective"]
        values.append(float("inf") if value is None else float(value))
    return values
