"""What `deme demo` does besides commands: two of them side by side, the picture at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deme_cli import console


def finetune_side_by_side(
    commands: Mapping[str, Sequence[str]], outputs: Mapping[str, Sequence[Path]], *, updates: int
) -> None:
    """Run finetuning command lines, each in a process of its own, under one bar.

    commands: the words after `deme`, by label.   outputs: the artifacts that each will write.
    updates: of all together. Raises JobFailed where one ends with an error, Stopped.
    """
    from deme_cli.training.jobs import RangeProcess, run_jobs
    from deme_cli.training.places import metrics_path

    processes = [
        RangeProcess(label, [*words, "--quiet"], [metrics_path(path) for path in outputs[label]])
        for label, words in commands.items()
    ]
    for process in processes:
        for curve in process.metrics:
            curve.unlink(missing_ok=True)
    with console.progress("finetune", updates, "update") as bar:
        for steps in run_jobs(processes, at_once=len(processes)):
            bar.advance(sum(steps.values()), "  ".join(f"{k} {v}" for k, v in steps.items()))


def draw_models(
    path: Path, samples: Mapping[str, Path], distances: Mapping[str, Sequence[float]],
    losses: Mapping[str, Sequence[float]], *, ranges: Sequence[str], metric: str, protocol: str,
) -> None:  # fmt: skip
    """Draw models beside each other, all given by name, the base first, as a PNG.

    samples: artifacts of images.   distances: `metric`, by seed.   losses: held out, by range.
    protocol: the line below.
    """
    from deme_cli.analysis.demo_picture import SummaryRow, draw_summary

    rows = [
        SummaryRow(name, images, tuple(distances[name]), tuple(losses[name]))
        for name, images in samples.items()
    ]
    draw_summary(rows, ranges, path, metric=metric, protocol=protocol)
