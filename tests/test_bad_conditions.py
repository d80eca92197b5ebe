"""Frozen parts that are missing or others than before: one line each, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from deme_cli.errors import ArtifactError, DemeError, MissingError

FEW = ("--steps", 1, "--batch-size", 2, "--accumulation", 1, "--held-out", 0)


@pytest.fixture
def refused(
    deme: Callable[..., Result], pipelines: Callable[..., Path], image_folder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:  # fmt: skip
    """Run a command line beside the base of sd and `images`; it must fail in one line."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"file_name": f"{i:02d}.png", "text": f"digit {i}"}) for i in range(10)]
    Path("images/metadata.jsonl").write_text("\n".join(lines))
    assert deme("split", pipelines("sd"), "-n", 2, "--data", "images").exit_code == 0

    def run(error: type[DemeError], *words: object) -> str:
        before = set(tmp_path.rglob("*.safetensors"))
        result = deme(*words)
        assert isinstance(result.exception, error), (result.exception, result.output)
        assert set(tmp_path.rglob("*.safetensors")) == before
        message = str(result.exception)
        assert "\n" not in message
        return message

    return run


def finetune(base: str, *more: object) -> tuple[object, ...]:
    return ("finetune", "--range", "1/2", "--base", base, "--data", "images", *FEW, *more)


def test_a_missing_frozen_part_is_named_by_every_command_that_needs_it(
    refused: Callable[..., str], pipelines: Callable[..., Path]
) -> None:
    shutil.copytree(pipelines("sd"), "broken")
    shutil.rmtree("broken/text_encoder")
    for words in (
        finetune("base.safetensors", "--pipeline", "broken"),
        ("sample", "base.safetensors", "--prompt", "a boat", "-n", 1, "--pipeline", "broken"),
        ("export", "base.safetensors", "out", "--pipeline", "broken"),
        ("split", "broken", "-o", "again"),
    ):
        assert "the text_encoder is missing" in refused(MissingError, *words)
    assert not Path("out").exists()


def test_a_cache_made_with_another_vae_is_refused(
    refused: Callable[..., str], deme: Callable[..., Result], pipelines: Callable[..., Path]
) -> None:
    made = deme(*finetune("base.safetensors", "--cache", "cache", "-o", "a.safetensors"))
    assert made.exit_code == 0, made.exception
    shutil.copytree(pipelines("sd"), "other")
    config = Path("other/vae/config.json")
    config.write_text(config.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.7'))
    deme("split", "other", "-o", "run", "--data", "images")
    again = finetune("run/base.safetensors", "--cache", "cache", "-o", "b.safetensors")
    message = refused(ArtifactError, *again)
    assert "made with another vae" in message
    assert "--cache" in message
