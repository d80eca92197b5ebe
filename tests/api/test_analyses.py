"""The analyses in Python: what the command line writes and prints, and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from deme_cli.analysis_config import (
    ANALYSES,
    ActivationConfig,
    GradientConfig,
    LandscapeConfig,
    LossConfig,
    TaskVectorConfig,
)
from deme_cli.api.analyze_activations import analyze_activations
from deme_cli.api.analyze_gradients import analyze_gradients
from deme_cli.api.analyze_landscape import analyze_landscape
from deme_cli.api.analyze_losses import analyze_losses
from deme_cli.api.analyze_task_vectors import analyze_task_vectors
from deme_cli.api.analyzing import Analysis
from deme_cli.config import DataConfig
from deme_cli.errors import ConfigError
from deme_cli.run_file import RunFile

Deme = Callable[..., Result]
DIGITS = {"images": DataConfig(source="digits")}
BASE, FIRST, LAST = "base.safetensors", "ft_1of4.safetensors", "ft_4of4.safetensors"


@dataclass(frozen=True)
class Case:
    """One analysis, cheap: its command line, and the same in Python."""

    typed: str
    function: Callable[..., Analysis]
    called: tuple[Any, ...]
    options: dict[str, Any]


CASES = {
    "losses": Case(
        f"{BASE} {FIRST} --data digits --buckets 4 --num 4 -n 2",
        analyze_losses, ([BASE, Path(FIRST)], LossConfig(buckets=4, num=4)),
        {**DIGITS, "num_ranges": 2},
    ),
    "gradients": Case(
        "--data digits --buckets 4 --num 4 -n 2",
        analyze_gradients, (None, GradientConfig(buckets=4, num=4)), {**DIGITS, "num_ranges": 2},
    ),
    "activations": Case(
        f"{FIRST} --data digits --num 4 --controls 1 --range 3/4 --block mid_block",
        analyze_activations, (FIRST, ActivationConfig(num=4, controls=1)),
        {**DIGITS, "range": "3/4", "block": "mid_block"},
    ),
    "landscape": Case(
        f"{BASE} {FIRST} {LAST} --mark ft_2of4.safetensors --data digits --points 3 --num 16 "
        f"--report-num 16",
        analyze_landscape,
        ([BASE, FIRST, LAST], LandscapeConfig(points=3, num=16, report_num=16)),
        {**DIGITS, "marks": ["ft_2of4.safetensors"]},
    ),
    "task-vectors": Case(
        f"{FIRST} {LAST} --no-ranks",
        analyze_task_vectors, ([FIRST, LAST], TaskVectorConfig(ranks=False)), {},
    ),
}  # fmt: skip


def test_every_analysis_has_a_case() -> None:
    assert list(CASES) == list(ANALYSES)


@pytest.mark.parametrize("kind", CASES)
def test_python_and_the_command_line_write_one_document(
    deme: Deme, run_folder: Path, kind: str
) -> None:
    case = CASES[kind]
    typed = deme("analyze", kind, *case.typed.split(), "-o", "typed.json", "--json")
    assert typed.exit_code == 0, typed.exception
    made = case.function(*case.called, **case.options, output=Path("called.json"))
    assert made.document == json.loads(Path("typed.json").read_text())
    assert made.document == json.loads(made.path.read_text())
    assert made.document["kind"] == kind
    assert made.document["reading"] == made.reading
    assert made.paths == [Path("called.json"), Path("called.png"), Path("called.svg")]
    assert all(path.stat().st_size for path in made.paths)
    printed = json.loads(typed.stdout)
    assert printed.pop("paths") == ["typed.json", "typed.png", "typed.svg"]
    assert json.loads(json.dumps(made.facts)) | {"schema_version": 1} == printed
    with pytest.raises(ConfigError, match=r"called\.json exists"):
        case.function(*case.called, **case.options, output=Path("called.json"))


@pytest.mark.parametrize("kind", CASES)
def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(
    run_folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case, before = CASES[kind], sorted(Path().iterdir())
    made = case.function(*case.called, **case.options, dry_run=True)
    assert capsys.readouterr().err.count("\n") == 1
    assert made == Analysis(Path(f"{kind}.json"), [], "", {}, {"dry_run": True})
    assert made.paths == []
    assert sorted(Path().iterdir()) == before


def test_what_cannot_be_done_is_said_before_torch_is_loaded(run_folder: Path) -> None:
    Path("taken.json").write_text("{}")
    before = sorted(Path().iterdir())
    code = """if True:
        import sys
        from pathlib import Path
        from deme_cli.analysis_config import GradientConfig
        from deme_cli.api import analyzing
        from deme_cli.api.analyze_activations import analyze_activations
        from deme_cli.api.analyze_gradients import analyze_gradients
        from deme_cli.api.analyze_landscape import analyze_landscape
        from deme_cli.api.analyze_losses import analyze_losses
        from deme_cli.api.analyze_task_vectors import analyze_task_vectors
                from deme_cli.config import DataConfig
        from deme_cli.errors import DemeError

        base, digits, taken = "base.safetensors", DataConfig(source="digits"), Path("taken.json")
        for call in (
            lambda: analyze_losses(images=digits, split="test"),
            lambda: analyze_losses(images=DataConfig(source="nowhere")),
            lambda: analyze_gradients(images=digits, settings=GradientConfig(buckets=101)),
            lambda: analyze_gradients(),
            lambda: analyze_activations(base, base=base, images=digits),
            lambda: analyze_landscape(marks=[base], images=digits),
            lambda: analyze_task_vectors([base]),
            lambda: analyze_task_vectors(output=taken),
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
    told = done.stdout.splitlines()
    expected = [
        "--split test: expected one of train, held-out", "nowhere", "has 100 timesteps",
        "no images", "have the same weights", "--mark: models are marked on the plane",
        "expected an artifact of kind 'expert' or 'task-vector'", "taken.json exists",
    ]  # fmt: skip
    for line, part in zip(told, expected, strict=True):
        assert part in line
    assert sorted(Path().iterdir()) == before


def test_settings_of_analyses_have_no_table_and_refuse_what_does_not_fit() -> None:
    assert RunFile().settings(LossConfig, num=4, buckets=None) == LossConfig(num=4)
    with pytest.raises(ConfigError, match=r"^num = 0: expected a number above 0$"):
        RunFile().settings(LossConfig, num=0)
