"""`deme` command lines as processes of their own, started by a `deme` that watches them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO


def start_deme(
    words: Sequence[str], *, num_threads: int, errors: int | IO[bytes], folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start `deme` with these words in `folder`; what it says goes to `errors`, results nowhere.

    Its threads wait passively unless the environment says otherwise: spinning ones take the core
    from the process next to it. It runs alone, whatever launch this process is of.
    """
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    environment |= {"OMP_NUM_THREADS": str(num_threads), "WORLD_SIZE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "deme_cli", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,  # Ctrl-C comes to the one who watches, and is passed on once
    )


def reason_of(code: int, said: bytes) -> str:
    """Why a process failed: the last line of what it said, or the signal that killed it."""
    lines = said.decode(errors="replace").strip().splitlines()
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return lines[-1].removeprefix("deme: ") if lines else "no message"
