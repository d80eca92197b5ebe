"""Weights of another dtype, with other names, or that are no numbers: told, and by which code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.errors import ArtifactError, NumericsError

NAME = "conv_in.weight"


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the weights in a file; its record stays right."""
    record, weights = read_record(path), load_tensors(path)
    change(weights)
    path.unlink()
    write_artifact(path, weights, record)
    return path


def narrow(weights: dict[str, torch.Tensor]) -> None:
    weights[NAME] = weights[NAME].half()


def rename(weights: dict[str, torch.Tensor]) -> None:
    weights["conv_in.wight"] = weights.pop(NAME)


def poison(weights: dict[str, torch.Tensor]) -> None:
    weights[NAME] = torch.full_like(weights[NAME], torch.nan)


FINETUNE = ["finetune", "--range", "1/4", "--steps", "2", "-b", "2", "--data", "digits",
            "-o", "new.safetensors"]  # fmt: skip
SAMPLE = ["sample", "{model}", "-n", "2", "--steps", "2", "-o", "new.safetensors"]
MERGE = ["merge", "ft_1of4.safetensors", "ft_2of4.safetensors", "-o", "new.safetensors"]
EVAL = ["eval", "{model}", "--fid", "digits", "--num", "4"]
LOSSES = ["analyze", "losses", "{model}", "--data", "digits", "--num", "2", "--buckets", "2",
          "-o", "new.json"]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "change", "error"),
    [
        (MERGE, narrow, ArtifactError),
        (MERGE, rename, ArtifactError),
        (SAMPLE, rename, ArtifactError),
        (SAMPLE, poison, NumericsError),
        pytest.param(LOSSES, poison, NumericsError, marks=pytest.mark.slow),
        pytest.param(EVAL, poison, NumericsError, marks=pytest.mark.slow),
        pytest.param(EVAL, rename, ArtifactError, marks=pytest.mark.slow),
    ],
)
def test_wrong_weights_are_told_and_leave_nothing(
    words: list[str], change: Callable, error: type[Exception], run_folder: Path, deme: Callable
) -> None:
    model = rewrite(run_folder / "ft_1of4.safetensors", change)
    result = deme(*(word.format(model=model) for word in words))
    assert type(result.exception) is error, result.exception
    assert "\n" not in str(result.exception)
    assert not list(run_folder.glob("new*"))


@pytest.mark.slow
@pytest.mark.parametrize(("change", "error"), [(poison, NumericsError), (rename, ArtifactError)])
def test_a_wrong_base_is_not_trained_on(
    change: Callable, error: type[Exception], run_folder: Path, deme: Callable
) -> None:
    rewrite(run_folder / "base.safetensors", change)
    result = deme(*FINETUNE)
    assert type(result.exception) is error, result.exception
    assert not (run_folder / "new.safetensors").exists()


@pytest.mark.slow
def test_a_merge_of_what_is_no_number_is_told(run_folder: Path, deme: Callable) -> None:
    rewrite(run_folder / "ft_1of4.safetensors", poison)
    result = deme(*MERGE)
    assert isinstance(result.exception, NumericsError), result.exception
