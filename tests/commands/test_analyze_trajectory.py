"""`deme analyze trajectory` denoises one noise with every model, tells, and draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_base
from PIL import Image
from typer.testing import Result

from deme_cli.errors import ArtifactError, ConfigError, MissingError

Deme = Callable[..., Result]
FEW = ["-n", 2, "--steps", 5, "--shown", 2]


def test_the_file_the_pictures_and_the_sentence(deme: Deme, run_folder: Path) -> None:
    result = deme("analyze", "trajectory", "--json", "--eta", 1, *FEW)
    assert result.exit_code == 0, result.exception
    told = json.loads(result.stdout)
    assert told["paths"] == ["trajectory.json", "trajectory.png", "trajectory.svg"]
    assert told["reading"] in result.stderr
    assert "ensemble and base predict most alike at t = " in told["reading"]
    document = json.loads(Path("trajectory.json").read_text())
    assert (document["kind"], document["unit"]) == ("trajectory", "levels of 255")
    assert (document["t"], document["shown"]) == ([80, 60, 40, 20, 0], [0, 4])
    assert document["models"] == told["models"]
    names = ["base", "ft_1of4", "ft_2of4", "ft_3of4", "ft_4of4", "ensemble"]
    assert [model["name"] for model in document["models"]] == names
    assert list(document["protocol"]["models"]) == names
    assert (document["protocol"]["sampler"], document["protocol"]["num"]) == ("ddim", 2)
    ensemble = document["models"][-1]
    acted = [ensemble["experts"][index]["name"] for index in ensemble["acted"]]
    assert acted == ["ft_4of4", "ft_3of4", "ft_2of4", "ft_1of4", "ft_1of4"]
    distance = ensemble["distances"]["base"]
    assert len(distance["mean"]) == len(distance["sd"]) == 5
    assert distance["final_mean"] == pytest.approx(np.mean(distance["final"]), rel=1e-5)
    assert distance["final_sd"] == pytest.approx(np.std(distance["final"], ddof=1), rel=1e-5)
    assert Image.open("trajectory.png").width > 1000
    assert not list(Path().glob(".trajectory*"))


def test_one_model_is_a_strip_without_distances(deme: Deme, run_folder: Path) -> None:
    result = deme("analyze", "trajectory", "base.safetensors", "-n", 1, "--steps", 2)
    assert result.exit_code == 0, result.exception
    assert "base alone: 1 images in 2 steps; name more models" in result.stderr
    (model,) = json.loads(Path("trajectory.json").read_text())["models"]
    assert model["distances"] == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--shown", 0], ConfigError, "shown = 0"),
        (["--rows", -1], ConfigError, "rows = -1"),
        (["-n", 0], ConfigError, "num = 0"),
        (["--steps", 101], ConfigError, "steps = 101"),
        (["--sampler", "euler", "--eta", 1], ConfigError, "works with the sampler ddim alone"),
        (["--prompt", "a", "--prompts", "digits"], ConfigError, "one of the two"),
        (["--prompt", "a cat"], ConfigError, "draws from noise alone"),
        (["-o", "x.png"], ConfigError, "ends in .json"),
        (["-o", "taken.json"], ConfigError, "taken.json exists; add --force"),
        (["none.safetensors"], MissingError, "no such file"),
        (["base.safetensors", "wide.safetensors"], ArtifactError, "another shape of x_t"),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    deme: Deme, run_folder: Path, arguments: list, error: type, message: str
) -> None:
    Path("taken.json").write_text("{}")
    write_tiny_base(Path("wide.safetensors"), in_channels=3, out_channels=3)
    before = sorted(Path().iterdir())
    result = deme("analyze", "trajectory", *arguments)
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)
    assert sorted(Path().iterdir()) == before


def test_a_folder_with_nothing_and_a_dry_run_write_nothing(
    deme: Deme, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(Path().iterdir())
    result = deme("analyze", "trajectory", "--dry-run", *FEW)
    assert result.exit_code == 0
    assert "ft_4of4, ensemble: 2 images each, ddim, 5 forwards an image" in result.stderr
    assert sorted(Path().iterdir()) == before
    monkeypatch.chdir(tmp_path.parent)
    result = deme("analyze", "trajectory")
    assert isinstance(result.exception, MissingError)
    assert "no models in" in str(result.exception)


def test_the_first_prompts_are_drawn_and_models_of_other_parts_refused(
    deme: Deme, pipelines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("one\ntwo\nthree\n")
    arguments = ["analyze", "trajectory", pipelines("sd"), "--prompts", "prompts.txt", "--dry-run"]
    for num, expected in ((2, 2), (16, 3)):
        assert f": {expected} images each" in deme(*arguments, "-n", num).stderr
    shutil.copytree(pipelines("sd"), "other")
    with Path("other/text_encoder/config.json").open("a") as config:
        config.write("\n")
    result = deme(*arguments, "other")
    assert isinstance(result.exception, ArtifactError)
    assert "another set of frozen parts than" in str(result.exception)
