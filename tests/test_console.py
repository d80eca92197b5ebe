"""What a narrow terminal shows: notes broken at words, counts and times whole."""

from __future__ import annotations

import io
import re
import sys

import pytest

from deme_cli import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 60 columns in place of stderr, which pytest replaces before each test."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_note_is_broken_at_words_and_a_path_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    words = (
        "± is the standard deviation over repeats; differences are paired by repeat, in brackets"
    )
    path = "/" + "long/" * 20 + "name.safetensors"
    console.note(f"{words}\n{path}")
    lines = terminal.getvalue().splitlines()
    assert all(len(line) <= 60 for line in lines if line != path)
    assert " ".join(lines) == f"{words} {path}"
    assert path in lines


def test_without_a_terminal_a_note_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("word " * 40)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_long_note_beside_a_bar_leaves_counts_and_time_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = use_terminal(monkeypatch)
    detail = "  ".join(f"{i}/4: 300" for i in range(1, 9))
    with console.showing() as show:
        show(console.Step(label="loading the libraries"))
        show(console.Step(1110, 1200, "4 experts", "update", detail=detail))
    first, *_, last = plain(terminal.getvalue()).splitlines()
    assert "loading the libraries" in first
    assert "4 experts" in last
    assert "1110/1200" in last
    assert last.rstrip().endswith("… -:--:--")  # its time is not known yet


def test_the_numbers_of_a_column_share_their_digits_after_the_point() -> None:
    for values, figures, digits in [
        ([3.79, 1.615, 2.5], 3, 2), ([0.065, 0.029], 2, 3), ([0.03509, 0.001045], 3, 5),
        ([312.4, 0.77], 3, 3), ([5e4, 1e-9], 3, 1), ([0.0, float("nan")], 2, 2), ([12345], 3, 0),
    ]:  # fmt: skip
        assert console.decimals(values, figures) == digits, values


def test_without_a_terminal_what_is_done_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with console.showing() as show:
        for done in (0, 2, 4, 4, 4):
            show(console.Step(done, 4, "drawing", "image"))
    assert capsys.readouterr().err.count("drawing: 4/4") == 1
