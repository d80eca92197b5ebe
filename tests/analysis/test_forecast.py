"""The forecast: the same as short experts and plain finetuning by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def test_a_stopped_forecast_goes_on_and_equals_the_commands_by_hand(
    deme: Callable, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("deme.toml").write_text(
        "[data]\nsource = 'digits'\n[split]\nn = 2\n[finetune]\nbatch_size = 4\nlr = 1e-2\n"
    )
    forecast = ["analyze", "forecast", "--updates", 10, "--buckets", 4, "--num", 8]
    with monkeypatch.context() as patch:
        patch.setattr("deme_cli.analysis.forecast.analyze_losses", None)
        deme(*forecast)
    kept = Path(".forecast.unfinished")
    assert len(list(kept.glob("*/*.safetensors"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr("deme_cli.analysis.forecast.finetune", None)  # all of them are there
        assert deme(*forecast).exit_code == 0
    assert not kept.exists()
    by_hand = ["finetune", "--p", 0, "--consistency", 0, "--projection", "none", "--held-out", 0]
    for name, span, steps in (
        ("plain", "1/1", 20), ("short_1of2", "1/2", 10), ("short_2of2", "2/2", 10),
    ):  # fmt: skip
        deme(*by_hand, "--range", span, "--steps", steps, "-o", f"{name}.safetensors")
    shorts = ["short_1of2.safetensors", "short_2of2.safetensors"]
    losses = ["analyze", "losses", "plain.safetensors", *shorts, "--buckets", 4, "--num", 8]
    assert deme(*losses).exit_code == 0
    plain, *_, ensemble = json.loads(Path("losses.json").read_text())["models"]
    expected = 100 * (ensemble["loss"] / plain["loss"] - 1)
    found = json.loads(Path("forecast.json").read_text())
    assert found["changes"]["short experts"][0][0] == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 1e-3
