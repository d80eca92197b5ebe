"""Two experts side by side against one after the other: `deme finetune --range all --jobs 2`.

    python examples/benchmarks/bench_parallel.py [--rounds 5] [--steps 300] [--rows all]

Two ranges of the digits model, as the command line trains them. Rows:

    jobs 1                   --jobs 1: one after the other, threads as torch chooses
    jobs 2                   --jobs 2: two processes, the cores divided among them
    1 thread, in turn        --jobs 1 with OMP_NUM_THREADS=1
    2 spinning, in turn      --jobs 1 with OMP_WAIT_POLICY=active
    2 passive, at once       two commands started by hand at the same time, two threads each
    2 spinning, at once      the same, their threads spinning: what --jobs keeps one from

Seconds are of whole commands: each training process imports torch, which takes about as long in
every row. Target: jobs 1 / jobs 2 >= 1.7 on two quiet cores. By default the first three rows run;
--rows all runs the others as well, of which the last is slow by a multiple: it makes a tenth of the
updates, and is given in updates per second like all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rounds import in_turn, machine, ratios, spread, verdict

DEME = [sys.executable, "-m", "deme_cli"]
ROWS: dict[str, tuple[str, dict[str, str]]] = {  # how it runs, what the environment says
    "jobs 1": ("--jobs 1", {}),
    "jobs 2": ("--jobs 2", {}),
    "1 thread, in turn": ("--jobs 1", {"OMP_NUM_THREADS": "1"}),
    "2 spinning, in turn": ("--jobs 1", {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "active"}),
    "2 passive, at once": ("at once", {"OMP_NUM_THREADS": "2"}),
    "2 spinning, at once": ("at once", {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "active"}),
}
USUAL = ("jobs 1", "jobs 2", "1 thread, in turn")
SLOW = {"2 spinning, at once": 10}  # by how much fewer updates


def environment_of(chosen: dict[str, str]) -> dict[str, str]:
    """This process's, with nothing said about OpenMP but what the row says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    return {**kept, **chosen}


def run_row(name: str, steps: int, folder: Path) -> float:
    """Seconds in which both experts are trained, `steps` updates each."""
    how, chosen = ROWS[name]
    words = [
        "finetune", "--steps", str(steps), "--batch-size", "64", "--held-out", "0",
        "--checkpoint-every", str(10 * steps), "--force", "--quiet",
    ]  # fmt: skip
    if how == "at once":
        commands = [[*DEME, *words, "--range", f"{i}/2"] for i in (1, 2)]
    else:
        commands = [[*DEME, *words, "--range", "all", *how.split()]]
    began = time.perf_counter()
    running = [
        subprocess.Popen(command, cwd=folder, env=environment_of(chosen), stdout=subprocess.DEVNULL)
        for command in commands
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(f"{name}: deme failed")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="updates per expert")
    parser.add_argument(
        "--rows", default=";".join(USUAL), help="all, or some by name, separated by semicolons"
    )
    options = parser.parse_args()
    rows = list(ROWS) if options.rows == "all" else options.rows.split(";")
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"unknown row {unknown[0]!r}; known: {'; '.join(ROWS)}")
    began = time.perf_counter()
    print(machine())
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    steps = {row: max(1, options.steps // SLOW.get(row, 1)) for row in rows}
    with tempfile.TemporaryDirectory(prefix="bench-parallel-") as folder:
        subprocess.run(
            [*DEME, "split", "digits", "-n", "2", "--quiet"], cwd=folder, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for counts, row in in_turn(rows, options.rounds):
            spent = run_row(row, steps[row], Path(folder))
            if counts:
                seconds[row].append(spent)
    print("\n| row | updates per expert | seconds | updates/s, both experts |\n|---|---|---|---|")
    for row, each in seconds.items():
        rate = 2 * steps[row] / statistics.median(each)
        print(f"| {row} | {steps[row]} | {spread(each, 1)} | {rate:.0f} |")
    if "jobs 2" in rows:
        for row in ("jobs 1", "1 thread, in turn"):
            if row in rows:
                quotients = ratios(seconds[row], seconds["jobs 2"])
                print(verdict(f"\n{row} / jobs 2", quotients, ">= 1.7" if row == "jobs 1" else ""))
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
