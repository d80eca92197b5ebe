"""The rounds of the benchmarks are fair, their growth is fitted right. Nothing is timed here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from deme_cli import console

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "benchmarks"


def load(name: str) -> ModuleType:
    """A module of the benchmarks that imports nothing but the standard library."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_each_round_begins_with_another_way_and_the_first_does_not_count() -> None:
    turns = list(load("rounds").in_turn(["a", "b", "c"], 2))
    assert [name for _, name in turns] == [*"abc", *"bca", *"cab"]
    assert [counts for counts, _ in turns] == [False] * 3 + [True] * 6


def test_ratios_are_of_the_runs_of_one_round() -> None:
    rounds = load("rounds")
    ticks = iter([0, 9, 10, 19, 20, 21, 30, 33, 40, 48, 50, 52])  # one pair per run
    seconds = rounds.timed_rounds({"a": lambda: 0, "b": lambda: 0}, 2, lambda: next(ticks))
    assert seconds == {"a": [3, 8], "b": [1, 2]}
    assert rounds.ratios(seconds["a"], seconds["b"]) == [3.0, 4.0]
    assert rounds.spread([3.0, 4.0, 8.0]) == "4.00 (3.00 to 8.00)"


def test_three_points_give_the_exponent_whatever_starting_takes() -> None:
    cost = load("cost")
    sizes = [2.0, 6.0, 18.0]
    for p in (0.5, 1.0, 2.0):
        found = cost.growth(sizes, [40 + 3 * x**p for x in sizes], 1.0, 0.1)
        assert float(found.exponent) == pytest.approx(p, abs=0.01)
    line = cost.growth(sizes, [40 + 3 * x for x in sizes], 10.0, 0.1)
    assert (line.per_unit, line.at_nothing) == pytest.approx((30, 40))
    assert cost.growth(sizes, [40, 40.1, 40.05], 1.0, 0.3).exponent == "flat"
    assert cost.growth(sizes, [40, 39, 60], 1.0, 0.3).exponent == "unclear"


def test_what_a_gpu_is_asked_for_runs_small_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the ten minutes that there is a GPU, no part may fail for a name that has moved."""
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(console, "_quiet", False)  # as it is now, again in the end
    monkeypatch.setattr(
        sys, "argv", ["gpu", "--tiny", "--device", "cpu", "--rounds", "1", "-o", str(output)]
    )
    gpu = load("gpu")
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    parts = json.loads(output.read_text())["parts"]
    assert not ended.value.code, parts
    assert list(parts) == list(gpu.PARTS)
    for goal in gpu.GOALS:
        part, figure = goal.split(".")
        assert parts[part].get(figure, 0) > 0 or "not run" in parts[part], goal
