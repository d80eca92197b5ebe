"""Where a run keeps its state and its curve: beside the artifact it will write. Needs no torch."""

from __future__ import annotations

from pathlib import Path


def checkpoint_path(output: Path) -> Path:
    """The state from which the run that writes `output` continues; hidden, so globs pass it by."""
    return output.parent / f".{output.stem}.checkpoint"


def metrics_path(output: Path) -> Path:
    """The curve of the run that writes `output`: one JSON record a line."""
    return output.with_name(f"{output.stem}.metrics.jsonl")
