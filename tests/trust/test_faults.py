"""Faults on purpose: whatever is killed, filled up or altered, nothing half-written is left.

Slow; run it by hand with `pytest -n 0 -s -m slow tests/trust/test_faults.py`. It prints how many
faults of which kind were injected and what came of them.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from trust.faulty_runs import DEADLINE, fork, fresh, result, unsound_files

pytestmark = pytest.mark.slow

SETTINGS = '[data]\nsource = "digits"\n[finetune]\nbatch_size = 8\nheld_out = 16\n'
PAIR = ["ft_1of4.safetensors", "ft_2of4.safetensors"]
MOMENTS = int(os.environ.get("DEME_FAULT_MOMENTS", "2"))  # of each signal to each command
STOPPED = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}
SIGNALS = (signal.SIGKILL, *STOPPED)


@dataclass(frozen=True)
class Command:
    """A command line, and the files whose content it decides."""

    words: list[str]
    outputs: tuple[str, ...]


COMMANDS = {
    "finetune": Command(
        ["finetune", "--range", "2/4", "--steps", "40", "--checkpoint-every", "8",
         "-o", "tuned.safetensors"], ("tuned.safetensors",)),
    "merge": Command(
        ["merge", *PAIR, "-w", "0.1,0.2", "-o", "plain.safetensors"], ("plain.safetensors",)),
    "merge --search": Command(
        ["merge", *PAIR, "--search", "grid", "--grid", "0,1", "--num", "32",
         "-o", "searched.safetensors"], ("searched.safetensors",)),
    "sample": Command(
        ["sample", "base.safetensors", "-n", "24", "--steps", "10", "-b", "4",
         "-o", "drawn.safetensors"], ("drawn.safetensors", "drawn.png")),
    "sample to a folder": Command(
        ["sample", "base.safetensors", "-n", "24", "--steps", "10", "-b", "4", "-o", "pictures"],
        ("pictures/000000.png", "pictures/000023.png", "pictures/samples.json")),
    "eval": Command(
        ["eval", "base.safetensors", *PAIR, "--fid", "digits", "--num", "24", "--json"], ()),
    "analyze losses": Command(
        ["analyze", "losses", "base.safetensors", *PAIR, "--buckets", "4", "--num", "16",
         "-o", "losses.json"], ("losses.json",)),
}  # fmt: skip


class Tally:
    """What was done and what came of it, printed at the end."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def add(self, kind: str, code: int, fine: bool, what: str = "") -> None:
        self.faults[kind] += 1
        self.codes[f"{kind}: exit {code}"] += 1
        if not fine:
            self.wrong.append(f"{kind}: exit {code} {what}".strip())

    def __str__(self) -> str:
        lines = [f"  {count:4d}  {kind}" for kind, count in sorted(self.faults.items())]
        codes = [f"  {count:4d}  {kind}" for kind, count in sorted(self.codes.items())]
        total = sum(self.faults.values())
        return "\n".join(
            [f"\n{total} faults injected", *lines, "exit codes", *codes,
             f"{len(self.wrong)} wrong", *(f"  {one}" for one in self.wrong)]
        )  # fmt: skip


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    told = Tally()
    yield told
    print(told)


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a folder with a base, four experts and a deme.toml, as `deme split` leaves it."""

    def make(folder: Path | None = None) -> Path:
        place = folder or tmp_path_factory.mktemp("faults") / "run"
        shutil.copytree(finished_run, place, dirs_exist_ok=True)
        (place / "deme.toml").write_text(SETTINGS)
        return place

    return make


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: what it left and printed, and how long it took."""

    result: dict[str, Any]
    printed: Any
    seconds: float


@pytest.fixture(scope="module")
def whole(run: Callable[[], Path]) -> Callable[[str], Whole]:
    """The uninterrupted run of a command, made once."""
    made: dict[str, Whole] = {}

    def of(name: str) -> Whole:
        if name not in made:
            command = COMMANDS[name]
            assert go(command.words, run())[0] == 0  # what is imported and cached by a first run
            folder = run()
            began = time.monotonic()
            code, printed = go(command.words, folder)
            assert code == 0, name
            assert unsound_files(folder) == []
            seconds = time.monotonic() - began
            made[name] = Whole(result(folder, command.outputs), metrics(printed), seconds)
        return made[name]

    return of


def go(words: list[str], folder: Path, prepare: Any = None) -> tuple[int, str]:
    """Exit code and results of a command that nobody disturbs; what it said where it fails."""
    process = fork(words, folder, prepare)
    code = process.wait()
    return code, process.printed.read_text() if code == 0 else process.said.read_text()


def metrics(printed: str) -> Any:
    """The rows of `eval --json`; nothing for commands that print paths."""
    import json

    return [row["metrics"] for row in json.loads(printed)["rows"]] if '"rows"' in printed else None


def require_goes_on(name: str, folder: Path, whole: Whole) -> str:
    """The same command reaches the result of a run that was not disturbed; else what is wrong."""
    command = COMMANDS[name]
    if unsound := unsound_files(folder):
        return f"half-written: {unsound}"
    was_done = all(result(folder, command.outputs).values()) and command.outputs
    code, printed = go(command.words, folder)
    if code == 2 and was_done and "--force" in printed:
        code = 0  # it was finished when it was hit: nothing is repeated unasked
    elif code == 0 and metrics(printed) != whole.printed:
        return f"other numbers: {printed}"
    if code:
        return f"does not go on: {code} {printed[-300:]}"
    if result(folder, command.outputs) != whole.result:
        return "another result"
    return "; ".join(unsound_files(folder))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_any_moment_loses_nothing(
    name: str, number: signal.Signals, run: Callable[[], Path],
    whole: Callable[[str], Whole], tally: Tally,
) -> None:  # fmt: skip
    draws, undisturbed = random.Random(f"{name} {number}"), whole(name)
    for _ in range(MOMENTS):
        folder = run()
        process = fork(COMMANDS[name].words, folder)
        time.sleep(draws.uniform(0.05, 1.0) * undisturbed.seconds)
        process.hurt(number)
        code = process.wait()
        kind = f"{number.name} to {name}"
        wrong = require_goes_on(name, folder, undisturbed)
        # 0: done before the signal came; minus the signal: it came before or after the work
        right = code in (0, -number, STOPPED.get(number))
        said = process.said.read_text()
        lines = [line for line in said.splitlines() if line.startswith("deme: ")]
        if code == 75 and len(lines) != 1:
            wrong = wrong or f"not one line: {said[-300:]}"
        tally.add(kind, code, right and not wrong, wrong or said[-300:])
        assert right, said[-2000:]
        assert not wrong


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "eval"])
def test_a_limit_on_the_size_of_files_is_told(
    name: str, run: Callable[[], Path], whole: Callable[[str], Whole], tally: Tally
) -> None:
    folder = run()
    code, said = go(COMMANDS[name].words, folder, limit_files)
    wrong = require_goes_on(name, folder, whole(name))
    small = "folder" in name and code == 0  # single pictures are smaller than that
    tally.add(f"file size limit for {name}", code, (code == 3 or small) and not wrong, said[-300:])
    assert code == 3 or small, said
    assert not wrong


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB of its own; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place])
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path, left: int) -> None:
    """Fill a disk up to `left` bytes."""
    with (place / "filler").open("wb") as file:
        file.write(b"\1" * max(0, shutil.disk_usage(place).free - left))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "eval"])
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    name: str, disk: Path, run: Callable[..., Path], whole: Callable[[str], Whole], tally: Tally
) -> None:
    for left in (0, 16_384):
        shutil.rmtree(disk / "run", ignore_errors=True)
        folder = run(disk / "run")
        fill(disk, left)
        code = fork(COMMANDS[name].words, folder).wait()
        (disk / "filler").unlink()
        wrong = require_goes_on(name, folder, whole(name))
        tally.add(f"full disk for {name}", code, code in (0, 3) and not wrong, wrong)
        assert code in (0, 3)
        assert not wrong


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "eval"])
def test_a_read_only_disk_is_told_before_the_work(
    name: str, disk: Path, run: Callable[..., Path], tally: Tally
) -> None:
    folder = run(disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = fresh(COMMANDS[name].words, folder)
    lines = [line for line in done.stderr.splitlines() if line.startswith("deme: ")]
    fine = done.returncode == 3 and len(lines) == 1 and "read-only" in done.stderr
    tally.add(f"read-only disk for {name}", done.returncode, fine, done.stderr[-300:])
    assert fine, done.stderr


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "eval"])
def test_two_writers_of_one_output_leave_one_whole_result(
    name: str, run: Callable[[], Path], whole: Callable[[str], Whole], tally: Tally
) -> None:
    folder = run()
    writers = [fork(COMMANDS[name].words, folder) for _ in range(2)]
    codes = sorted(writer.wait() for writer in writers)
    said = "".join(writer.said.read_text()[-400:] for writer in writers)
    wrong = require_goes_on(name, folder, whole(name))
    fine = codes in ([0, 0], [0, 2])
    tally.add(f"two writers: {name}", codes[1], fine and not wrong, f"{codes} {wrong} {said}")
    assert fine, said
    assert not wrong


def test_children_whose_parent_is_killed_leave_nothing_broken(
    run: Callable[[], Path], tally: Tally
) -> None:
    words = [
        "finetune",
        "--range",
        "all",
        "--jobs",
        "2",
        "--steps",
        "24",
        "--checkpoint-every",
        "6",
    ]
    names = [f"ft_{index}of4.safetensors" for index in range(1, 5)]
    folders = [run(), run()]
    for folder in folders:
        for name in names:
            (folder / name).unlink()
    done = fresh(words, folders[0])
    assert done.returncode == 0, done.stderr
    parent = fork(words, folders[1])
    began = time.monotonic()
    while not list(folders[1].glob("*.metrics.jsonl")) and time.monotonic() - began < DEADLINE:
        time.sleep(0.1)
    parent.hurt(signal.SIGKILL)
    code = parent.wait()
    for _ in range(60):  # until the children left behind are done, or gone with their parent
        assert unsound_files(folders[1]) == []
        again = fresh(words, folders[1])
        if again.returncode != 2:
            break
        time.sleep(2)
    same = again.returncode == 0 and result(folders[0], names) == result(folders[1], names)
    tally.add("parent vanished", code, same, again.stderr[-400:])
    assert same, again.stderr


BACKWARDS = """
import time
_real, _calls = time.time, [0]
def _jumping():
    _calls[0] += 1
    return _real() - 86_400.0 * (_calls[0] % 7) * 365
time.time = _jumping
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_depends_on_the_wall_clock(
    name: str, tmp_path: Path, run: Callable[[], Path], whole: Callable[[str], Whole], tally: Tally
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BACKWARDS)
    folder = run()
    for index, path in enumerate(folder.iterdir()):
        os.utime(path, (index * 1e9, index * 1e9))  # 1970 to 2128
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = fresh(COMMANDS[name].words, folder, PYTHONPATH=path)
    same = result(folder, COMMANDS[name].outputs) == whole(name).result
    same = same and (done.returncode != 0 or metrics(done.stdout) == whole(name).printed)
    tally.add(f"clock jumps during {name}", done.returncode, done.returncode == 0 and same)
    assert done.returncode == 0, done.stderr
    assert same


def test_a_signal_during_the_imports_leaves_nothing_behind(
    run: Callable[[], Path], tally: Tally
) -> None:
    import sys

    folder = run()
    before = sorted(folder.iterdir())
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-m", "deme_cli", *COMMANDS["finetune"].words], cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        time.sleep(0.3)
        process.send_signal(number)
        code = process.wait()
        assert code == (75 if number == signal.SIGTERM else -signal.SIGKILL)
        tally.add(f"{number.name} during imports", code, sorted(folder.iterdir()) == before)
        assert sorted(folder.iterdir()) == before
