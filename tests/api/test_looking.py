"""Comparisons, reports, headers, trials and inventory in Python, as the command line has them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import deme_cli
from deme_cli.config import FinetuneConfig, MergeConfig, SplitConfig
from deme_cli.errors import ArtifactError, ConfigError, MissingError

PLAN = """
title = "Two rows, one of them broken"
n = 2
updates = 2
seeds = [0]
[finetune]
batch_size = 4
held_out = 0
[sample]
steps = 2
[eval]
fid = "digits"
num = 6
[[row]]
name = "Before"
kind = "base"
[[row]]
name = "Broken"
kind = "finetune"
finetune = { lr = 1e30 }
"""


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, two experts of one update and what a search made of them."""
    monkeypatch.chdir(tmp_path)
    run = deme_cli.split("digits", SplitConfig(n=2)).run
    settings = run.settings(FinetuneConfig, steps=1, held_out=0, batch_size=4)
    experts = deme_cli.finetune("all", settings, run=run)
    grid = run.settings(MergeConfig, search="grid", grid=[0.0, 1.0], num=8, report=False)
    deme_cli.search(experts, grid, output=Path("merged.safetensors"), run=run)
    return tmp_path


def test_report_inspect_trials_and_inventory_are_those_of_the_command_line(deme, searched) -> None:
    made = deme_cli.report(output=Path("python.html"))
    told = json.loads(deme("report", "-o", "shell.html", "--json").stdout)
    assert (made.num_bytes, made.counts) == (told["bytes"], told["sections"])
    assert Path("python.html").read_bytes() == Path("shell.html").read_bytes()

    files = sorted(searched.glob("*.safetensors"))
    told = json.loads(deme("inspect", *map(str, files), "--json").stdout)["artifacts"]
    found = deme_cli.inspect(files, verify=True)
    assert [one["fingerprint"] for one in told] == [one.record.fingerprint for one in found]
    assert told[-1]["record"] == json.loads(json.dumps(asdict(found[-1].record)))

    shown = deme_cli.show_search(Path("merged.safetensors"))
    told = json.loads(deme("merge", "--show", "merged.safetensors", "--json").stdout)
    assert [trial.objective for trial in shown.trials] == [t["objective"] for t in told["trials"]]
    assert shown.is_finished
    assert shown.best in shown.best_of_rung(0)[:1]
    assert shown.picture.exists()

    inventory = deme_cli.take_inventory()
    told = json.loads(deme("doctor", "--json").stdout)
    assert told["versions"] == inventory.versions
    assert [item["name"] for item in told["items"]] == [item.name for item in inventory.items]


def test_what_cannot_be_looked_at_is_told_as_by_the_command_line(searched) -> None:
    path = searched / "base.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert deme_cli.inspect([path])[0].record.kind == "base"
    with pytest.raises(ArtifactError, match="altered or damaged"):
        deme_cli.inspect([path], verify=True)
    with pytest.raises(MissingError, match="no journal of its search"):
        deme_cli.show_search(path)
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        deme_cli.report(output=Path("report.pdf"))
    with pytest.raises(ConfigError, match="no row of that name"):
        deme_cli.compare("table3", only=["Nobody"], output=searched / "table3")


def test_what_cannot_be_done_is_said_before_torch_is_loaded(run_folder: Path) -> None:
    Path("two.toml").write_text(PLAN)
    Path("report.html").touch()
    before = sorted(Path().rglob("*"))
    code = """if True:
        import sys
        from pathlib import Path
        from deme_cli.comparison.compare import compare
        from deme_cli.html_report import report
        from deme_cli.artifacts import inspect
        from deme_cli.api.merging import show_search
        from deme_cli.errors import DemeError

        for call in (
            lambda: compare("nowhere"),
            lambda: compare("two.toml", seeds=[1, 1]),
            lambda: compare("two.toml", budget="time"),
            lambda: compare("two.toml", updates=0),
            lambda: report(),
            lambda: report(output=Path("report.pdf")),
            lambda: report(Path("nowhere")),
            lambda: inspect([Path("nowhere")]),
            lambda: inspect([Path("two.toml")]),
            lambda: show_search(Path("nowhere")),
        ):
            try:
                call()
            except DemeError as error:
                print(error)
            else:
                raise AssertionError("nothing was refused")
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [
        "nowhere: no such plan", "seeds = [1, 1]", "budget = 'time'", "updates = 0",
        "report.html exists", "ends in .html", "nowhere: no such folder", "nowhere",
        "two.toml: not a", "nowhere: no such journal",
    ]  # fmt: skip
    for line, part in zip(done.stdout.splitlines(), expected, strict=True):
        assert part in line
    assert sorted(Path().rglob("*")) == before
