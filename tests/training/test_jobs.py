"""Processes side by side: what they say is kept and does not hold them up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from typing import IO

import pytest

from deme_cli.training import jobs

TALKATIVE = "import sys; sys.stderr.write('x' * (1 << 20) + '\\ndeme: the reason'); sys.exit(3)"


def test_a_process_that_says_more_than_a_pipe_holds_ends_with_its_last_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(words: Sequence[str], *, num_threads: int, errors: IO[bytes]) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", TALKATIVE], stderr=errors)

    monkeypatch.setattr(jobs, "start_deme", start)
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.1)
    polls = jobs.run_jobs([jobs.RangeProcess("1/2", [], [])], at_once=1)
    with pytest.raises(jobs.JobFailed, match="range 1/2: the reason") as error:
        list(islice(polls, 100))  # ends without an error where it waits for somebody to read
    assert error.value.exit_code == 3
