"""Processes side by side: what they say is kept and does not hold them up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from typing import IO

import pytest

from deme_cli import jobs
from deme_cli.errors import DemeError

TALKATIVE = "import sys; sys.stderr.write('x' * (1 << 20) + '\\ndeme: the reason'); sys.exit(3)"
NOTES = "import sys; print('a note', 'expert 1/2: 3/3  9 update/s', sep='\\n', file=sys.stderr)"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What runs in place of `deme`."""
    words = [sys.executable, "-c"]

    def start(_: Sequence[str], *, num_threads: int, errors: IO[bytes]) -> subprocess.Popen:
        return subprocess.Popen(words, stderr=errors)

    monkeypatch.setattr(jobs, "start_deme", start)
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.05)
    jobs.console.set_quiet(False)
    return words


def test_what_processes_note_is_told_once(
    program: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    program.append(NOTES)
    ranges = [jobs.RangeProcess(label, [], []) for label in ("1/2", "2/2")]
    list(jobs.run_jobs(ranges, at_once=2))
    assert capsys.readouterr().err == "a note\n"


def test_a_process_that_says_more_than_a_pipe_holds_ends_with_its_last_line(
    program: list[str],
) -> None:
    program.append(TALKATIVE)
    polls = jobs.run_jobs([jobs.RangeProcess("1/2", [], [])], at_once=1)
    with pytest.raises(DemeError, match="range 1/2: the reason") as error:
        list(islice(polls, 100))  # ends without an error where it waits for somebody to read
    assert error.value.exit_code == 3
