"""`deme report` writes one file, and says what was missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

Deme = Callable[..., Result]


def test_the_page_the_notes_and_the_document(deme: Deme, run_folder: Path) -> None:
    (run_folder / "torn.safetensors").write_bytes(b"x")
    (run_folder / "ft_3of4.safetensors").unlink()
    (run_folder / "losses.json").write_text('{"schema_version": 1, "kind": "losses"}')
    result = deme("report", "--json", "--title", "Mine & yours")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    content = Path("report.html").read_bytes()
    assert (document["paths"], document["bytes"]) == (["report.html"], len(content))
    assert b"<h1>Mine &amp; yours</h1>" in content
    assert (document["sections"]["artifacts"], document["sections"]["tables"]) == (4, 0)
    assert [one["what"] for one in document["missing"]] == [
        "expert 3 of 4", "a merged model", "images", "a table",
    ]  # fmt: skip
    assert b"<code>deme finetune --range 3/4</code>" in content
    assert [one["name"] for one in document["unread"]] == ["torn.safetensors"]
    assert ": 1 figure, 4 artifacts" in result.stderr
    assert "not there: a merged model (deme merge ft_*.safetensors" in result.stderr
    assert "torn.safetensors: not shown: not a whole safetensors file" in result.stderr


def test_a_report_goes_into_its_folder_and_replaces_nothing_unasked(
    deme: Deme, refuse: Callable, run_folder: Path
) -> None:
    Path("elsewhere").mkdir()
    assert deme("report", run_folder, "-q").stdout == f"{run_folder / 'report.html'}\n"
    first = (run_folder / "report.html").read_bytes()
    refuse(2, "report.html exists; add --force", "report", run_folder)
    assert deme("report", run_folder, "-o", "elsewhere/mine.html").exit_code == 0
    assert [path.name for path in Path("elsewhere").iterdir()] == ["mine.html"]
    assert deme("report", run_folder, "--force").exit_code == 0
    assert (run_folder / "report.html").read_bytes() == first


def test_bad_input_is_told_and_nothing_is_written(refuse: Callable, run_folder: Path) -> None:
    Path("empty").mkdir()
    for exit_code, message, argument in (
        (3, "nowhere: no such folder", "nowhere"), (2, "ends in .html", "--output=report.pdf"),
        (3, "is a file, not a run folder", "base.safetensors"),
        (3, "empty: nothing of deme's here; a run begins with", "empty"),
    ):  # fmt: skip
        refuse(exit_code, message, "report", argument)
