"""Looking at runs in Python: what cannot be looked at is said before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
        from deme_cli.merging.show_search import show_search
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
