"""`deme analyze losses`: the file, the pictures, the sentence, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_tiny_base
from typer.testing import Result

from deme_cli.errors import ArtifactError, ConfigError, MissingError

Deme = Callable[..., Result]
FEW = ["--buckets", 4, "--num", 4]


def test_the_folder_is_measured_and_told(deme: Deme, run_folder: Path) -> None:
    result = deme("analyze", "losses", "--data", "digits", "--json", *FEW)
    assert result.exit_code == 0, result.exception
    shown = json.loads(result.stdout)
    assert shown["paths"] == ["losses.json", "losses.png", "losses.svg"]
    document = json.loads(Path("losses.json").read_text())
    assert (document["kind"], document["schema_version"]) == ("losses", 1)
    assert document["ranges"] == ["0:25", "25:50", "50:75", "75:100"]
    assert [row["name"] for row in document["models"]][-1] == "ensemble"
    assert document["models"] == shown["models"]
    assert document["reading"] in result.stderr
    assert document["protocol"]["data"]["split"] == "held-out"
    assert len(document["protocol"]["models"]["ensemble"]) == 4
    assert not list(Path().glob(".losses*"))
    again = deme("analyze", "losses", "--data", "digits", *FEW)
    assert "losses.json exists" in str(again.exception)


def test_one_model_alone_and_equal_ranges(deme: Deme, run_folder: Path) -> None:
    result = deme(
        "analyze",
        "losses",
        "base.safetensors",
        "--data",
        "digits",
        "-n",
        2,
        "--split",
        "train",
        *FEW,
    )
    assert result.exit_code == 0, result.exception
    assert "the loss of base is " in result.stderr
    assert json.loads(Path("losses.json").read_text())["ranges"] == ["0:50", "50:100"]


def test_bad_input_is_told_and_a_dry_run_writes_nothing(deme: Deme, run_folder: Path) -> None:
    write_tiny_base(run_folder / "other.safetensors", sample_size=16)
    before = sorted(Path().iterdir())
    for arguments, error, message in (
        (["--buckets", 0], ConfigError, "buckets = 0"),
        (["--buckets", 101], ConfigError, "this model has 100 timesteps"),
        (["--split", "test"], ConfigError, "--split test: expected one of train, held-out"),
        (["-o", "x.txt"], ConfigError, "ends in .json"),
        (["base.safetensors", "other.safetensors"], ArtifactError, "another shape of x_t"),
        (["base.safetensors", "base.safetensors"], ConfigError, "given twice"),
        (["none.safetensors"], MissingError, "no such file"),
    ):
        result = deme("analyze", "losses", *arguments, "--data", "digits")
        assert isinstance(result.exception, error), result.exception
        assert message in str(result.exception)
    Path("deme.toml").write_text('[split]\nranges = ["0:50", "50:200"]\n')
    result = deme("analyze", "losses", "base.safetensors", "--data", "digits")
    assert "[split] ranges: they end at 200, but this model has 100" in str(result.exception)
    Path("deme.toml").unlink()
    assert deme("analyze", "losses", "--data", "digits", "--dry-run").exit_code == 0
    assert "no images" in str(deme("analyze", "losses", "--data", "").exception)
    assert sorted(Path().iterdir()) == before


def test_an_empty_folder_says_what_is_missing(
    deme: Deme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = deme("analyze", "losses", "--data", "digits")
    assert isinstance(result.exception, MissingError)
    assert "no models in" in str(result.exception)


def test_latents_and_flow_are_measured_too(
    deme: Deme, pipelines: Callable[..., Path], image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image_folder.parent)
    rows = [json.dumps({"file_name": f"{i:02d}.png", "text": f"thing {i}"}) for i in range(10)]
    (image_folder / "metadata.jsonl").write_text("\n".join(rows))
    result = deme(
        "analyze", "losses", pipelines("sd3"), "--data", image_folder, "--buckets", 2, "--num", 2,
        "-n", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
