"""Faults on purpose: whatever is killed, filled up or altered, nothing half-written is left.

Slow; run it by hand with `pytest -n 0 -m slow tests/trust/test_faults.py`. A process is forked from
one that has imported everything, so that a fault hits its work rather than its imports.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deme_cli.artifacts import fingerprint_file, read_record, record_of
from deme_cli.files import read_header

pytestmark = pytest.mark.slow

SETTINGS = '[data]\nsource = "digits"\n[finetune]\nbatch_size = 8\nheld_out = 16\n'
PAIR = ["ft_1of4.safetensors", "ft_2of4.safetensors"]
MOMENTS = int(os.environ.get("DEME_FAULT_MOMENTS", "2"))  # of each signal to each command
STOPPED = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}
DEADLINE = 240.0
LOGS = Path(tempfile.mkdtemp(prefix="deme-faults-"))  # on no disk that is filled up
_NUMBERS = itertools.count()
# Command lines, and the files whose content each decides.
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "finetune": (
        ["finetune", "--range", "2/4", "--steps", "40", "--checkpoint-every", "8",
         "-o", "tuned.safetensors"], ("tuned.safetensors",)),
    "merge": (
        ["merge", *PAIR, "-w", "0.1,0.2", "-o", "plain.safetensors"], ("plain.safetensors",)),
    "merge --search": (
        ["merge", *PAIR, "--search", "grid", "--grid", "0,1", "--num", "32",
         "-o", "searched.safetensors"], ("searched.safetensors",)),
    "sample": (
        ["sample", "base.safetensors", "-n", "24", "--steps", "10", "-b", "4",
         "-o", "drawn.safetensors"], ("drawn.safetensors", "drawn.png")),
    "sample to a folder": (
        ["sample", "base.safetensors", "-n", "24", "--steps", "10", "-b", "4", "-o", "pictures"],
        ("pictures/000000.png", "pictures/000023.png", "pictures/samples.json")),
    "eval": (
        ["eval", "base.safetensors", *PAIR, "--fid", "digits", "--num", "24", "--json"], ()),
    "analyze losses": (
        ["analyze", "losses", "base.safetensors", *PAIR, "--buckets", "4", "--num", "16",
         "-o", "losses.json"], ("losses.json",)),
}  # fmt: skip
WRITERS = [name for name in COMMANDS if name != "eval"]


@dataclass
class Forked:
    """A command in a process of its own, and the files with what it said."""

    process: ForkServerProcess
    said: Path
    printed: Path

    def wait(self) -> int:
        """The exit code; minus the signal that killed it. Fails where it hangs."""
        self.process.join(DEADLINE)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"hangs: {self.said.read_text()}")
        return self.process.exitcode


def fork(words: Sequence[str], folder: Path, prepare: Callable[[], None] | None = None) -> Forked:
    """Start `deme` with these words in `folder`; `prepare` is called in the new process first."""
    number = next(_NUMBERS)
    said, printed = (LOGS / f"{number}.{end}" for end in ("err", "out"))
    server = get_context("forkserver")  # this process has run autograd, whose threads do not fork
    server.set_forkserver_preload(["deme_cli.__main__", "torch", "diffusers", __name__])
    process = server.Process(target=_command, args=(words, folder, prepare, said, printed))
    process.start()
    return Forked(process, said, printed)


def _command(
    words: Sequence[str], folder: Path, prepare: Callable[[], None] | None, said: Path,
    printed: Path,
) -> None:  # fmt: skip
    code = 1
    try:
        os.setsid()
        for descriptor, path in ((2, said), (1, printed)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
        with os.fdopen(1, "w") as sys.stdout, os.fdopen(2, "w") as sys.stderr:
            for one in STOPPED:
                is_ctrl_c = one == signal.SIGINT
                signal.signal(one, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)
            os.chdir(folder)
            sys.argv = ["deme", *words]
            try:
                if prepare is not None:
                    prepare()
                from deme_cli.__main__ import main

                main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(code)


def unsound_files(folder: Path) -> list[str]:
    """Files under a final name that are not whole, and why; hidden ones are nobody's result."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".safetensors":
                header = read_header(path)
                assert record_of(header).fingerprint == fingerprint_file(path), "other bytes"
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":  # a log may end in a line being written
                [json.loads(line) for line in path.read_text().splitlines()[:-1]]
            elif path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
        except Exception as error:
            found.append(f"{path.name}: {type(error).__name__} {error}")
    return found


def result(folder: Path, outputs: Sequence[str]) -> list[Any]:
    """What a command left behind, so that two runs can be compared; None for what is missing."""
    paths = [folder / name for name in outputs]
    return [
        None if not path.exists()
        else read_record(path).fingerprint if path.suffix == ".safetensors"
        else path.read_bytes()
        for path in paths
    ]  # fmt: skip


def go(words: list[str], folder: Path, prepare: Any = None) -> tuple[int, str]:
    """Exit code and results of a command that nobody disturbs; what it said where it fails."""
    process = fork(words, folder, prepare)
    code = process.wait()
    return code, (process.printed if code == 0 else process.said).read_text()


def metrics(printed: str) -> Any:
    """The rows of `eval --json`; nothing for commands that print paths."""
    return [row["metrics"] for row in json.loads(printed)["rows"]] if '"rows"' in printed else None


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder with a base, four experts and a deme.toml, as `deme split` leaves it."""

    def make() -> Path:
        place = tmp_path_factory.mktemp("faults") / "run"
        shutil.copytree(finished_run, place, dirs_exist_ok=True)
        (place / "deme.toml").write_text(SETTINGS)
        return place

    return make


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path]) -> Callable[[str], tuple[list[Any], Any, float]]:
    """An uninterrupted run of a command, made once: what it left, what it printed, its seconds."""
    made: dict[str, tuple[list[Any], Any, float]] = {}

    def of(name: str) -> tuple[list[Any], Any, float]:
        if name not in made:
            words, outputs = COMMANDS[name]
            assert go(words, run())[0] == 0  # what is imported and cached by a first run
            folder, began = run(), time.monotonic()
            code, printed = go(words, folder)
            assert code == 0, name
            assert unsound_files(folder) == []
            made[name] = result(folder, outputs), metrics(printed), time.monotonic() - began
        return made[name]

    return of


@pytest.fixture
def goes_on(whole: Callable) -> Callable[[str, Path], None]:
    """Checks that the same command reaches the result of a run that was not disturbed."""

    def check(name: str, folder: Path) -> None:
        words, outputs = COMMANDS[name]
        assert unsound_files(folder) == [], "half-written"
        was_done = outputs and all(result(folder, outputs))
        code, printed = go(words, folder)
        if not (code == 2 and was_done and "--force" in printed):  # else it was finished when hit
            assert code == 0, printed[-300:]
            assert metrics(printed) == whole(name)[1]
        assert result(folder, outputs) == whole(name)[0]
        assert unsound_files(folder) == []

    return check


@pytest.mark.parametrize("number", [signal.SIGKILL, *STOPPED], ids=lambda number: number.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_any_moment_loses_nothing(
    name: str, number: signal.Signals, run: Callable, whole: Callable, goes_on: Callable
) -> None:
    draws = random.Random(f"{name} {number}")
    for _ in range(MOMENTS):
        folder, seconds = run(), whole(name)[2]
        process = fork(COMMANDS[name][0], folder)
        time.sleep(draws.uniform(0.05, 1.0) * seconds)
        os.kill(process.process.pid, number)
        code, said = process.wait(), process.said.read_text()
        # 0: done before the signal came; minus the signal: it came before or after the work
        assert code in (0, -number, STOPPED.get(number)), said[-2000:]
        assert code != 75 or said.count("deme: ") == 1, said[-300:]
        goes_on(name, folder)


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))


@pytest.mark.parametrize("name", WRITERS)
def test_a_limit_on_the_size_of_files_is_told(name: str, run: Callable, goes_on: Callable) -> None:
    folder = run()
    code, said = go(COMMANDS[name][0], folder, limit_files)
    assert code == 3 or ("folder" in name and code == 0), said  # single pictures are smaller
    goes_on(name, folder)
