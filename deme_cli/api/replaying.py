"""`replay`: a merged artifact built again from its parents, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deme_cli.api.merge_job import MergeResult
from deme_cli.outputs import require_output
from deme_cli.run_file import RunFile


def replay(
    merged: Path,
    output: Path | None = None,
    *,
    parents: Sequence[Path] = (),
    base: Path | None = None,
    run: RunFile | None = None,
    force: bool = False,
) -> MergeResult:
    """Build `merged` again as its record tells it.

    output: None for {merged}.replayed.safetensors.   parents, base: where they are now, if not
    where they were. Raises ArtifactError where a parent has changed or the result differs,
    MissingError where one is gone; then no output appears.
    """
    from deme_cli.merging import replay as replaying

    target = output or merged.with_name(f"{merged.stem}.replayed.safetensors")
    require_output(target, force=force)
    record = replaying.replay(merged, target, parents=parents, base=base, run=run or RunFile())
    return MergeResult(target, record)
