"""`deme doctor`: what is there, what is missing, and where to get it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from typer.testing import Result

Deme = Callable[..., Result]


def test_doctor_lists_what_is_there_and_where_the_rest_comes_from(
    cache: Path, stand_in: Path, deme: Deme
) -> None:
    stand_in.rename(cache / "inception-2015-12-05.pt")
    found = json.loads(deme("doctor", "--json").stdout)
    assert found["schema_version"] == 1
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["device"]["auto"] in ("cpu", "cuda", "mps")
    items = {item["name"]: item for item in found["items"]}
    inception = items["inception-2015-12-05.pt"]
    assert inception["present"]
    assert inception["path"] == str(cache / "inception-2015-12-05.pt")
    assert inception["intact"] is False
    assert items["digit-features.pt"]["present"]
    missing = items["cifar10_clean_train_32.npz"]
    assert not missing["present"]
    assert missing["whence"].startswith("https://")
    assert not items["ViT-B-32.pt"]["present"]


def test_doctor_speaks_on_stderr(cache: Path, deme: Deme) -> None:
    shown = deme("doctor")
    assert shown.exit_code == 0
    assert shown.stdout == ""
    assert "missing  inception-2015-12-05.pt" in shown.stderr
    assert "present  digit-features.pt" in shown.stderr
    assert str(cache) in shown.stderr
