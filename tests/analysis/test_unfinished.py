"""What an analysis keeps: used again if all that decides it agrees, else dropped with a word."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from deme_cli.analysis.unfinished import Unfinished, discard, unfinished_path
from deme_cli.errors import ConfigError, Stopped

IDENTITY = {"model": "a", "shape": (1, 8, 8)}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "losses.json"


def keep_some(output: Path) -> None:
    with Unfinished(output, IDENTITY) as kept:
        kept.arrays["values"] = np.arange(3.0)


def test_arrays_come_back_until_they_are_discarded(output: Path) -> None:
    keep_some(output)
    with Unfinished(output, IDENTITY) as kept:
        assert kept.arrays["values"].tolist() == [0, 1, 2]
        kept.arrays["values"][1] = 7
    with Unfinished(output, IDENTITY) as kept:
        assert kept.arrays["values"][1] == 7
    discard(output)
    with Unfinished(output, IDENTITY) as kept:
        assert (kept.arrays, kept.note) == ({}, "")
    assert not unfinished_path(output).exists()


def test_arrays_of_something_else_are_not_used(output: Path) -> None:
    keep_some(output)
    with Unfinished(output, {**IDENTITY, "model": "b", "seed": 1}) as kept:
        assert kept.arrays == {}
        assert "had another model, seed; measuring all of it anew" in kept.note
    unfinished_path(output).write_bytes(unfinished_path(output).read_bytes()[:-4])
    with Unfinished(output, IDENTITY) as kept:
        assert "cannot be read" in kept.note
    with Unfinished(output, IDENTITY, force=True) as kept:
        assert (kept.arrays, kept.note) == ({}, "")


def test_what_was_found_outlives_a_caller_that_fails_to_draw_it(output: Path) -> None:
    def found():
        with Unfinished(output, IDENTITY) as kept:
            yield kept.arrays.setdefault("values", np.zeros(2))

    steps = found()
    next(steps)[:] = 5
    steps.close()
    assert next(found()).tolist() == [5, 5]


def stop_after_one_of_two(output: Path) -> None:
    with Unfinished(output, IDENTITY) as kept:
        kept.arrays["values"] = np.ones(2)
        kept.check()
        kept.done = "1 of 2 models"
        with pytest.raises(ConfigError, match="another deme process"):
            keep_some(output)
        os.kill(os.getpid(), signal.SIGTERM)
        kept.check()


def test_a_signal_saves_and_two_processes_exclude_each_other(output: Path) -> None:
    with pytest.raises(Stopped, match="stopped after 1 of 2 models") as stopped:
        stop_after_one_of_two(output)
    assert stopped.value.exit_code == 75
    with Unfinished(output, IDENTITY) as kept:
        assert kept.arrays["values"].tolist() == [1, 1]
