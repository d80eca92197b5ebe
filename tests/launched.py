"""Processes of one launch, started as a launcher starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def launch(
    folder: Path, *words: object, num: int = 2,
    by_rank: Callable[[int], list[str]] = lambda rank: [],
    machines: list[str] | None = None, program: Sequence[str] = ("-m", "deme_cli"),
) -> list[subprocess.Popen]:  # fmt: skip
    """`num` processes of `deme WORDS`, which meet each other, in the folder or one below each.

    On processors, for there may be fewer GPUs than processes. `program`: what Python runs instead.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environ = {
        **os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *program, *map(str, words), *by_rank(rank)],
            cwd=folder / (machines[rank] if machines else "."),
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(num)
    ]  # fmt: skip


def ends(processes: list[subprocess.Popen], seconds: float = 120) -> tuple[list[int], list[str]]:
    """Exit codes, and every line that says why."""
    said = [process.communicate(timeout=seconds)[1] for process in processes]
    lines = [line for text in said for line in text.splitlines()]
    assert not any("Traceback" in line for line in lines), lines
    return [p.returncode for p in processes], [line for line in lines if line[:5] == "deme:"]


def succeed(processes: list[subprocess.Popen], seconds: float = 120) -> str:
    """What the first one prints; the others print nothing, and all end well."""
    outputs = [process.communicate(timeout=seconds) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    assert all(output == ("", "") for output in outputs[1:]), outputs
    return outputs[0][0]


def stop_when(
    is_time: Callable[[], bool], processes: list[subprocess.Popen], rank: int,
    by: signal.Signals = signal.SIGTERM,
) -> tuple[list[int], list[str]]:  # fmt: skip
    """Ask one process to stop when it is time, or kill it; how all end."""
    deadline = time.monotonic() + 120
    while not is_time():
        assert all(process.poll() is None for process in processes), ends(processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[rank].send_signal(by)
    return ends(processes)
