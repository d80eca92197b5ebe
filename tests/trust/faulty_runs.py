"""`deme` command lines as processes that can be hurt, and what must hold of a folder afterwards.

A process is forked from this one, so that it starts in milliseconds and a fault hits its work
rather than its imports; `fresh` starts the real command for what happens before that.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from deme_cli.artifacts import fingerprint_file, read_record, record_of
from deme_cli.files import read_header

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
DEADLINE = 240.0
LOGS = Path(tempfile.mkdtemp(prefix="deme-faults-"))  # on no disk that is filled up
_NUMBERS = itertools.count()


@dataclass
class Forked:
    """A command in a process of its own: its number, and the files with what it said."""

    pid: int
    said: Path
    printed: Path

    def hurt(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; minus the signal that killed it. Fails where it hangs."""
        began = time.monotonic()
        while time.monotonic() - began < DEADLINE:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"hangs: {self.said.read_text()}")


def fork(words: Sequence[str], folder: Path, prepare: Any = None) -> Forked:
    """Start `deme` with these words in `folder`; `prepare` is called in the new process first."""
    number = next(_NUMBERS)
    said, printed = (LOGS / f"{number}.{end}" for end in ("err", "out"))
    pid = os.fork()
    if pid:
        return Forked(pid, said, printed)
    code = 1
    try:  # the child: nothing of pytest may run here
        code = _as_deme(words, folder, said=said, printed=printed, prepare=prepare)
    finally:
        os._exit(code)


def _as_deme(words: Sequence[str], folder: Path, *, said: Path, printed: Path, prepare: Any) -> int:
    """Be `deme` in this process; returns its exit code."""
    os.setsid()
    for descriptor, path in ((2, said), (1, printed)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    with os.fdopen(1, "w") as sys.stdout, os.fdopen(2, "w") as sys.stderr:
        for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(one, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        sys.argv = ["deme", *words]
        try:
            if prepare is not None:
                prepare()
            from deme_cli.__main__ import main

            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            return 1
    return 0


def fresh(words: Sequence[str], folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """The real command from its first import on, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "deme_cli", *words], cwd=folder, env={**ENVIRONMENT, **changes},
        capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip


def unsound_files(folder: Path) -> list[str]:
    """Files under a final name that are not whole, and why; hidden ones are nobody's result."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            _require_whole(path)
        except Exception as error:
            found.append(f"{path.name}: {type(error).__name__} {error}")
    return found


def _require_whole(path: Path) -> None:
    if path.suffix == ".safetensors":
        header = read_header(path)
        if "deme" in header.metadata:
            assert record_of(header).fingerprint == fingerprint_file(path), "other bytes"
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        for line in path.read_text().splitlines()[:-1]:  # a log may end in a line being written
            json.loads(line)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".svg":
        assert path.read_text().rstrip().endswith("</svg>"), "cut"


def result(folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """What a command left behind, so that two runs can be compared; None for what is missing."""
    found: dict[str, Any] = {}
    for name in outputs:
        path = folder / name
        if not path.exists():
            found[name] = None
        elif path.suffix == ".safetensors":
            found[name] = read_record(path).fingerprint
        elif path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        else:
            found[name] = path.read_bytes()
    return found
