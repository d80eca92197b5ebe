"""Wrong captions, prompts, frozen parts and caches: one line each, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from deme_cli.errors import ArtifactError, ConfigError, DemeError, MissingError

FEW = ("--steps", 1, "--batch-size", 2, "--accumulation", 1, "--held-out", 0)


@pytest.fixture(scope="module")
def bases(pipelines: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bases sd, dit and sd3 and the deme.toml of the first."""
    from deme_cli import split
    from deme_cli.config import SplitConfig

    folder = tmp_path_factory.mktemp("bases")
    for name in ("sd3", "dit", "sd"):
        made = split(
            str(pipelines(name)), SplitConfig(n=2), data="images",
            output=folder, force=True,
        )  # fmt: skip
        shutil.move(made.run.base, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def refused(
    deme: Callable[..., Result], bases: Path, image_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:  # fmt: skip
    """Run a command line beside bases sd, dit, sd3 and `images`; it must fail in one line."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases, tmp_path, dirs_exist_ok=True)

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
    return ("finetune", "--range", "1/2", "--base", f"{base}.safetensors", *FEW, *more)


def write_captions(rows: int) -> None:
    lines = [json.dumps({"file_name": f"{i:02d}.png", "text": f"digit {i}"}) for i in range(rows)]
    Path("images/metadata.jsonl").write_text("\n".join(lines))


def test_wrong_captions_and_prompts_are_told_in_one_line(refused: Callable[..., str]) -> None:
    train, beside = finetune("sd", "--data", "images"), Path("images/metadata.jsonl")
    assert "no captions: looked for metadata.jsonl" in refused(ArtifactError, *train)
    classes = finetune("dit", "--data", "images")
    assert "no classes: looked for metadata.jsonl" in refused(ArtifactError, *classes)
    write_captions(7)
    message = refused(ArtifactError, *train)
    assert "missing for 3 of 10 images, the first images/07.png" in message
    write_captions(10)
    message = refused(ArtifactError, *train, "--captions", "blip")
    assert "no column blip" in message
    assert "columns: file_name, text" in message
    beside.write_text("")
    assert "metadata.jsonl: the file is empty" in refused(ArtifactError, *train)
    draw = ("sample", "sd.safetensors", "--prompts")
    Path("prompts.csv").write_text("id,words\n1,a boat\n")
    message = refused(ArtifactError, *draw, "prompts.csv")
    assert "columns: id, words" in message
    assert "--prompt-column" in message
    message = refused(ConfigError, *draw, "prompts.csv", "--prompt-column", "x")
    assert "no column 'x'" in message
    Path("prompts.txt").write_text("a boat\na house\na tree\n")
    message = refused(ConfigError, *draw, "prompts.txt", "-n", 10)
    assert "holds 3 prompts, -n says 10" in message
    assert "draws prompts" in refused(ConfigError, "sample", "sd.safetensors")
    message = refused(ConfigError, "sample", "dit.safetensors", "--classes", "12")
    assert "class 12" in message
    assert "noise alone" in refused(ConfigError, "sample", "digits", "--prompts", "digits")
    flow = ("sample", "sd3.safetensors", "--prompt", "a boat", "-n", 1, "--sampler", "ddim")
    assert "euler" in refused(ConfigError, *flow)


def test_a_missing_frozen_part_is_named_by_every_command_that_needs_it(
    refused: Callable[..., str], pipelines: Callable[..., Path]
) -> None:
    write_captions(10)
    shutil.copytree(pipelines("sd"), "broken")
    shutil.rmtree("broken/text_encoder")
    for words in (
        finetune("sd", "--data", "images", "--pipeline", "broken"),
        ("sample", "sd.safetensors", "--prompt", "a boat", "-n", 1, "--pipeline", "broken"),
        ("export", "sd.safetensors", "out", "--pipeline", "broken"),
        ("split", "broken", "-o", "again"),
    ):
        assert "the text_encoder is missing" in refused(MissingError, *words)
    assert not Path("out").exists()


def test_a_cache_made_with_another_vae_is_refused(
    refused: Callable[..., str], deme: Callable[..., Result], pipelines: Callable[..., Path]
) -> None:
    write_captions(10)
    made = deme(*finetune("sd", "--data", "images", "--cache", "cache", "-o", "a.safetensors"))
    assert made.exit_code == 0, made.exception
    shutil.copytree(pipelines("sd"), "other")
    config = Path("other/vae/config.json")
    config.write_text(config.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.7'))
    deme("split", "other", "-o", "run", "--data", "images")
    message = refused(
        ArtifactError,
        *finetune("run/base", "--data", "images", "--cache", "cache", "-o", "b.safetensors"),
    )
    assert "made with another vae" in message
    assert "--cache" in message
