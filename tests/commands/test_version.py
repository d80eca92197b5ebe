"""`deme --version` names what decides the numbers."""

from __future__ import annotations

import re
from importlib import metadata


def test_it_names_the_libraries_and_the_device(deme) -> None:
    shown = deme("--version")
    assert shown.exit_code == 0
    first, libraries, device = shown.stdout.splitlines()
    assert first == f"deme {metadata.version('deme')}"
    assert f"torch {metadata.version('torch')}" in libraries
    assert f"diffusers {metadata.version('diffusers')}" in libraries
    assert re.fullmatch(r"device (cpu|cuda|mps) \(.+\)", device)
