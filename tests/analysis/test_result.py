"""What an analysis keeps: used again if all that decides it agrees, else dropped with a word."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deme_cli.analysis.result import Unfinished, document_bytes, unfinished_path
from deme_cli.errors import ConfigError, Stopped

IDENTITY = {"model": "a", "shape": (1, 8, 8)}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    with Unfinished(tmp_path / "losses.json", IDENTITY) as kept:
        kept.arrays["values"] = np.arange(3.0)
        kept.save()
    return tmp_path / "losses.json"


def test_arrays_come_back_unless_something_else_decides_them(output: Path) -> None:
    with Unfinished(output, IDENTITY) as kept:
        assert kept.arrays["values"].tolist() == [0, 1, 2]
        kept.arrays["values"][1] = 7
        kept.save()
    with Unfinished(output, IDENTITY) as kept:
        assert kept.arrays["values"][1] == 7
    with Unfinished(output, {**IDENTITY, "seed": 1}) as kept:
        assert (kept.arrays, "had another seed;" in kept.note) == ({}, True)
    file = unfinished_path(output)
    file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    with Unfinished(output, IDENTITY) as kept:
        assert (kept.arrays, "cannot be read" in kept.note) == ({}, True)
    with Unfinished(output, IDENTITY, force=True) as kept:
        assert (kept.arrays, kept.note) == ({}, "")
    assert not file.exists()


def test_a_signal_saves_and_so_does_a_picture_that_fails(output: Path) -> None:
    def measure(index: int, end: Callable[[Unfinished], object]) -> None:
        with Unfinished(output, IDENTITY) as kept:
            kept.arrays["values"][index] = 5
            end(kept)

    with pytest.raises(ZeroDivisionError):
        measure(2, lambda kept: 1 / 0)

    def stop(kept: Unfinished) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        kept.checker("half")()

    with pytest.raises(Stopped, match="after half; run the same command again") as stopped:
        measure(0, stop)
    assert stopped.value.exit_code == 75
    with Unfinished(output, IDENTITY) as kept:
        assert kept.arrays["values"].tolist() == [5, 1, 5]


def test_nobody_else_writes_the_output_meanwhile(output: Path) -> None:
    with (
        Unfinished(output, IDENTITY),
        pytest.raises(ConfigError, match="being written by another"),
        Unfinished(output, IDENTITY),
    ):
        pass


def test_a_document_holds_json_alone() -> None:
    shown = document_bytes("x", {"rows": [{"a": np.float32("nan")}], "path": Path("b")})
    assert shown == (
        b'{\n  "schema_version": 1,\n  "kind": "x",\n  "rows": [\n    {"a": null}\n  ],\n'
        b'  "path": "b"\n}\n'
    )
