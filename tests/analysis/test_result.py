"""What an analysis keeps, used again if all that decides it agrees; and how it looks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deme_cli.analysis.figure import render, shorten
from deme_cli.analysis.result import Kept, document_bytes, keeping
from deme_cli.console import Step, silent
from deme_cli.errors import ConfigError, Stopped

Open = Callable[..., AbstractContextManager[Kept]]
IDENTITY = {"model": "a", "shape": (1, 8, 8)}


@pytest.fixture
def open_kept(tmp_path: Path) -> Open:
    def opened(identity: dict, **options: Any) -> Any:
        usual = {"progress": silent, "force": False}
        return keeping(tmp_path / "x.json", identity, "x", "draw", 6, **{**usual, **options})

    return opened


def measure(kept: Kept, value: float) -> float:
    made = kept.unit("a", 3, lambda: {"x": np.array([value]), "y/z": np.arange(2.0)})
    assert made["y/z"].tolist() == [0, 1]
    return float(made["x"][0])


def stop_in_second_unit(kept: Kept) -> Any:
    def asked() -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        kept.check()

    assert measure(kept, 1) == 1
    return kept.unit("b", 3, asked)


def test_what_was_measured_comes_back_unless_something_else_decides_it(
    open_kept: Open, tmp_path: Path
) -> None:
    steps: list[Step] = []
    told = "after 3 of 6 draws; run the same command again"
    with pytest.raises(Stopped, match=told) as stopped, open_kept(IDENTITY) as kept:
        stop_in_second_unit(kept)
    assert stopped.value.exit_code == 75
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for identity, written, force, value, note in (
        (IDENTITY, whole, False, 1, "continuing after"),
        ({**IDENTITY, "seed": 1}, whole, False, 2, "of other settings"),
        (IDENTITY, whole[:-40], False, 2, "cannot be read"),
        (IDENTITY, whole[:200] + b"\1\2\3\4" + whole[204:], False, 2, "cannot be read"),
        (IDENTITY, whole, True, 2, ""),
    ):
        file.write_bytes(written)
        steps.clear()
        with open_kept(identity, force=force, progress=steps.append) as kept:
            assert measure(kept, 2) == value
        assert any(note in step.note for step in steps)
        assert not file.exists(), "all is done"


def test_nobody_else_writes_the_output_meanwhile(open_kept: Open) -> None:
    written = pytest.raises(ConfigError, match="being written by another")
    with open_kept(IDENTITY), written, open_kept(IDENTITY):
        pass


def test_a_document_holds_json_alone() -> None:
    shown = document_bytes("x", {"rows": [{"a": np.float32("nan")}], "path": Path("b")})
    assert shown == (
        b'{\n  "schema_version": 1,\n  "kind": "x",\n  "rows": [\n    {"a": null}\n  ],\n'
        b'  "path": "b"\n}\n'
    )


def test_titles_are_short_and_hold_no_mathematics() -> None:
    assert shorten("a" * 9 + "b" * 9, 7) == "aa…bbbb"
    png = render(lambda figure: figure.text(0, 0, "a$^$"), size=(2, 1), title="b$^$" * 50)
    assert png.startswith(b"\x89PNG")
