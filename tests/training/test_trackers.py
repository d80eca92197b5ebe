"""The curve of a run as TensorBoard's own reader finds it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deme_cli.errors import MissingError

WORDS = ("finetune", "--range", "1/2", "--steps", "4", "--batch-size", "4", "--held-out", "8")


def test_the_curve_is_that_of_the_metrics_and_a_run_that_goes_on_tells_no_step_twice(
    deme: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    assert deme("split", "digits", "-n", "2").exit_code == 0
    assert deme(*WORDS, "--checkpoint-every", "2", "--log-with", "tensorboard").exit_code == 0
    for _ in range(2):
        told = EventAccumulator("logs/ft_1of2").Reload()
        points = [
            json.loads(line) for line in Path("ft_1of2.metrics.jsonl").read_text().splitlines()
        ]
        for name in ("loss", "denoising", "lr", "held_out"):
            scalars = [(one.step, one.value) for one in told.Scalars(name)]
            expected = [(point["step"], pytest.approx(point[name], rel=1e-6)) for point in points]
            assert scalars == expected, name
        # the same run again from its beginning takes the place of the first
        again = deme(*WORDS, "--checkpoint-every", "2", "--log-with", "tensorboard", "--force")
        assert again.exit_code == 0


def test_a_tracker_that_is_not_installed_is_told_before_anything_begins(
    deme: Callable, refuse: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    monkeypatch.chdir(tmp_path)
    assert deme("split", "digits", "-n", "2").exit_code == 0
    refuse(MissingError.exit_code, "pip install wandb", *WORDS, "--log-with", "wandb")
