"""Where a run keeps its state, its curve and its further results: beside the artifact it will
write. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from deme_cli.config import AFFINITY_NAME, FinetuneConfig


def checkpoint_path(output: Path) -> Path:
    """The state from which the run that writes `output` continues; hidden, so globs pass it by."""
    return output.parent / f".{output.stem}.checkpoint"


def metrics_path(output: Path) -> Path:
    """The curve of the run that writes `output`: one JSON record a line."""
    return output.with_name(f"{output.stem}.metrics.jsonl")


def variant_path(output: Path, *, step: int | None = None, length: float | None = None) -> Path:
    """The result after `step` updates (the last if None), under an EMA of `length` (or the usual).

    In a folder beside the output, so that `ft_*.safetensors` names the experts alone:
    `ft_2of4.snapshots/step-000400.ema-0.050.safetensors`; the usual one at the end is the output.
    """
    words = []
    if step is not None:
        words.append(f"step-{step:06d}")
    if length is not None:
        short = f"{length:.3f}"
        words.append(f"ema-{short if float(short) == length else length}")
    if not words:
        return output
    return output.with_name(f"{output.stem}.snapshots") / f"{'.'.join(words)}{output.suffix}"


def variant_paths(output: Path, config: FinetuneConfig) -> list[Path]:
    """Every file that a run writes besides `output`, in the order in which they appear."""
    every, lengths = config.snapshot_every, config.ema_lengths or []
    steps = range(every, config.steps, every) if every else ()
    paths = [
        variant_path(output, step=step, length=length)
        for step in steps
        for length in (None, *lengths)
    ]
    return paths + [variant_path(output, length=length) for length in lengths]


def affinity_path(base: Path) -> Path:
    """Where the gradients of `base` are looked for, by which its timesteps may be clustered."""
    return base.with_name(AFFINITY_NAME)
