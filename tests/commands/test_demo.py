"""`deme demo` before it begins: a folder that cannot be made ends in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deme_cli.errors import ConfigError, MissingError


def test_a_folder_that_cannot_be_made_is_told(
    deme: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for arguments, error, message in (
        (["-o", "file"], ConfigError, "file exists; add --force"),
        (["-o", "file", "--force"], MissingError, "file: part of this path is a file"),
        (["-o", "file/below"], MissingError, "file/below: part of this path is a file"),
    ):
        result = deme("demo", *arguments)
        assert isinstance(result.exception, error), result.exception
        assert message in str(result.exception)
