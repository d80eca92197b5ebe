"""`deme demo` before it begins: a folder that cannot be made ends in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from deme_cli.errors import ConfigError, DemeError, MissingError


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (["-o", "file"], ConfigError, "file exists; add --force"),
    (["-o", "file", "--force"], MissingError, "file: cannot make this folder"),
    (["-o", "file/below"], MissingError, "file/below: cannot make this folder"),
])  # fmt: skip
def test_a_folder_that_cannot_be_made_is_told(
    deme: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], error: type[DemeError], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = deme("demo", *arguments)
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)
