"""How the cost of each command grows: time and memory against images, parameters, N and steps.

    python examples/benchmarks/cost.py [--repeats 1] [--only merge,sample]

Runs the command line itself, each command at three sizes that grow by one factor, on models with
random weights (8 x 8 digits, and google/ddpm-cifar10-32 at widths 32, 64 and 128: 2.2, 8.9 and 35.7
M parameters) and prints a table in Markdown. Of three points (x, y):

    per unit    the slope of the least-squares line, its unit in brackets
    at nothing  where the line meets x = 0: starting Python, importing torch, what does not grow
    exponent    p of y = a + b x^p, which three points fix: 1 is linear, whatever starting takes;
                `flat` where y grows by less than a tenth, or less than 0.3 s or 8 MB

Memory is the peak of RssAnon (Linux only): what the process allocates, not the files it maps. With
--repeats, times are the least of several, for what disturbs a run only adds to it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rounds import machine, watched

DEME = [sys.executable, "-m", "deme_cli"]
WIDTHS = (32, 64, 128)
COUNTS = (2, 4, 8)
QUIET = ["--force", "--quiet"]


@dataclass(frozen=True)
class Sweep:
    """A command at three sizes of one thing."""

    command: str
    against: str
    unit: float  # of `against`, that slopes are given per
    sizes: Sequence[float]
    words: Sequence[Sequence[str]]  # after the command, by size


@dataclass(frozen=True)
class Growth:
    """y = at_nothing + per_unit x, and the exponent of its growth beyond a constant."""

    per_unit: float
    at_nothing: float
    exponent: str


def prepare(folder: Path) -> dict[int, float]:
    """Models, their experts and images; returns millions of parameters by width."""
    from random_models import DIGITS, ddpm_cifar10, write_family, write_images, write_pipeline

    millions = {}
    for width in WIDTHS:
        place = folder / f"width{width}"
        write_pipeline(place / "pipeline", ddpm_cifar10(width))
        millions[width] = write_family(place, ddpm_cifar10(width), 4, scale=0.02) / 4e6
    for count in COUNTS:
        for name, config in (("digits", DIGITS), ("large", ddpm_cifar10(96))):
            (folder / f"{name}{count}").mkdir()
            write_family(folder / f"{name}{count}", config, count, scale=0.02)
    write_images(folder / "photos", 64)
    for num in (500, 2000, 8000):
        write_images(folder / f"images{num}", num, size=8)
    subprocess.run([*DEME, "split", "digits", "--quiet"], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return millions


def experts(place: str, count: int) -> list[str]:
    return [f"{place}/ft_{index}of{count}.safetensors" for index in range(1, count + 1)]


def sweeps(millions: dict[int, float]) -> list[Sweep]:
    """All that is measured; the paths are in the folder that `prepare` fills."""
    sizes, places = [millions[w] for w in WIDTHS], [f"width{w}" for w in WIDTHS]
    base, out = "base.safetensors", ["-o", "out.safetensors"]
    num, steps, updates = (64, 512, 4096), (10, 40, 160), (25, 100, 400)
    trained = ["--range", "1/4", "--held-out", "0", "--projection", "none", *out]
    photos = ["--data", "photos", "--steps", "4", "-b", "2"]
    return [
        Sweep("sample", "1000 images", 1000, num,
              [[base, "-n", f"{n}", "--steps", "20", *out] for n in num]),
        Sweep("eval", "1000 images", 1000, num,
              [[base, "--fid", "digits", "-n", f"{n}", "--steps", "20"] for n in num]),
        Sweep("stats", "1000 images", 1000, (500, 2000, 8000),
              [[f"images{n}", "--features", "digits", *out] for n in (500, 2000, 8000)]),
        Sweep("split", "M parameters", 1, sizes,
              [[f"{p}/pipeline", "--data", "photos", "-o", "imported"] for p in places]),
        Sweep("finetune", "M parameters", 1, sizes,
              [[*trained, "--base", f"{p}/base.safetensors", *photos] for p in places]),
        Sweep("task-vector", "M parameters", 1, sizes,
              [[*experts(p, 4), "-o", "vectors"] for p in places]),
        Sweep("merge", "M parameters", 1, sizes, [[*experts(p, 4), *out] for p in places]),
        Sweep("merge", "expert", 1, COUNTS, [[*experts(f"large{n}", n), *out] for n in COUNTS]),
        Sweep("ensemble-sample", "expert", 1, COUNTS,
              [[*experts(f"digits{n}", n), "-n", "512", "--steps", "20", *out] for n in COUNTS]),
        Sweep("sample", "100 steps", 100, steps,
              [[base, "-n", "256", "--steps", f"{s}", *out] for s in steps]),
        Sweep("finetune", "100 updates", 100, updates,
              [[*trained, "--steps", f"{s}", "-b", "64"] for s in updates]),
    ]  # fmt: skip


def growth(sizes: Sequence[float], values: Sequence[float], unit: float, floor: float) -> Growth:
    """Line and exponent through three points; `floor` is the growth that counts as none."""
    mean_x, mean_y = sum(sizes) / 3, sum(values) / 3
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(sizes, values, strict=True))
    slope /= sum((x - mean_x) ** 2 for x in sizes)
    return Growth(slope * unit, mean_y - slope * mean_x, exponent(sizes, values, floor))


def exponent(sizes: Sequence[float], values: Sequence[float], floor: float) -> str:
    """p of a + b x^p through three points, found by bisection; `flat` without growth."""
    (x1, x2, x3), (y1, y2, y3) = sizes, values
    if y3 - y1 < max(floor, 0.1 * y1):
        return "flat"
    if y2 <= y1 or y3 <= y2:
        return "unclear"
    low, high = 0.01, 5.0
    while high - low > 1e-3:
        p = (low + high) / 2
        if (x3**p - x2**p) / (x2**p - x1**p) < (y3 - y2) / (y2 - y1):
            low = p
        else:
            high = p
    return f"{low:.2f}"


def measure(sweep: Sweep, folder: Path, repeats: int) -> tuple[list[float], list[float]]:
    """Least seconds and largest MB of RssAnon, by size."""
    seconds: list[float] = []
    memory: list[float] = []
    for words in sweep.words:
        runs = [watched([*DEME, sweep.command, *words, *QUIET], folder) for _ in range(repeats)]
        seconds.append(min(run.seconds for run in runs))
        memory.append(max(run.anonymous or 0 for run in runs))
    return seconds, memory


def row(sweep: Sweep, seconds: Sequence[float], memory: Sequence[float]) -> str:
    time_growth = growth(sweep.sizes, seconds, sweep.unit, 0.3)
    cells = [
        f"{sweep.command} / {sweep.against}",
        ", ".join(f"{size:.0f}" if size > 50 else f"{size:.3g}" for size in sweep.sizes),
        ", ".join(f"{s:.1f}" for s in seconds),
        f"{time_growth.per_unit:.3g}",
        f"{time_growth.at_nothing:.1f}",
        time_growth.exponent,
    ]
    if all(memory):
        memory_growth = growth(sweep.sizes, memory, sweep.unit, 8)
        cells += [
            ", ".join(f"{m:.0f}" for m in memory),
            f"{memory_growth.per_unit:.3g}",
            f"{memory_growth.at_nothing:.0f}",
            memory_growth.exponent,
        ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", default="", help="commands, separated by commas")
    parser.add_argument("--folder", type=Path, help="where 2 GB of temporary files go")
    options = parser.parse_args()
    began, chosen = time.perf_counter(), options.only.split(",")
    print(machine())
    with tempfile.TemporaryDirectory(prefix="cost-", dir=options.folder) as name:
        folder = Path(name)
        todo = [s for s in sweeps(prepare(folder)) if not options.only or s.command in chosen]
        print(f"prepared in {time.perf_counter() - began:.0f} s\n")
        print(
            "| command / unit | sizes | seconds | s per unit | s at nothing | exponent "
            "| RssAnon, MB | MB per unit | MB at nothing | exponent |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for sweep in todo:
            print(row(sweep, *measure(sweep, folder, options.repeats)), flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
