"""What the benchmarks share: rounds in turn, their ratios, the machine, and commands watched.

Machines have moods, so two ways to do the same are compared within one round, where both had the
same mood, and a figure is the median over the rounds with the least and the most. A way that this
machine lacks is skipped in words, never counted. Imports nothing heavy: some benchmarks must not.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path


def in_turn(names: Sequence[str], rounds: int) -> Iterator[tuple[bool, str]]:
    """(whether it counts, name) of every run: each round begins with another one.

    One more round than asked for goes first, to warm up, and does not count.
    """
    for number in range(rounds + 1):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            yield number > 0, name


def rounds_of(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each way says, by round: the seconds that it took, without what it prepared."""
    said: dict[str, list[float]] = {name: [] for name in ways}
    for counts, name in in_turn(list(ways), rounds):
        value = ways[name]()
        if counts:
            said[name].append(value)
    return said


def timed_rounds(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds that each way takes, by round."""

    def timed(way: Callable[[], object]) -> float:
        began = clock()
        way()
        return clock() - began

    return rounds_of({name: partial(timed, way) for name, way in ways.items()}, rounds)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median (least to most)."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def verdict(label: str, values: Sequence[float], target: str = "") -> str:
    """One line for a ratio: label, median (least to most), number of rounds, target."""
    aim = f", target {target}" if target else ""
    return f"{label}: {spread(values)} in {len(values)} rounds{aim}"


def skip(name: str, why: str) -> None:
    """Say that a way to do it was not run: it counts for nothing."""
    print(f"SKIPPED {name}: {why}", flush=True)


def machine(device: str = "cpu") -> str:
    """The line that a figure needs to be read: cores, threads, load, versions, device."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch, name = sys.modules.get("torch"), _processor()
    threads = torch.get_num_threads() if torch else os.environ.get("OMP_NUM_THREADS", "unset")
    if torch and device.startswith("cuda"):
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    return (
        f"machine: {name}; {usable} cores, {threads} threads, OMP_WAIT_POLICY {policy}, load "
        f"{load}; device {device}; torch {version('torch')}, Python {platform.python_version()}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Finished:
    """A command that has ended well: its wall time, and its peak memory where Linux tells it."""

    seconds: float
    anonymous: float | None  # MB of RssAnon: its own memory, without mapped files
    output: str


def watched(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run a command to its end, looking at its memory every few milliseconds.

    Ends this program with what the command said where it fails.
    """
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **(environment or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        peak = max(peak, _anonymous_kilobytes(status))
        time.sleep(0.002)
    seconds = time.perf_counter() - began
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nfailed: {errors[-2000:]}")
    return Finished(seconds, peak * 1024 / 1e6 if peak else None, output)


def _anonymous_kilobytes(status: Path) -> int:
    try:
        lines = status.read_text().splitlines()
    except OSError:  # ended meanwhile, or no Linux
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
