"""`deme analyze landscape` measures, tells and draws; bad input is told before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from deme_cli.analysis.landscape.choices import choose_ranges
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.timesteps import TimestepRange, split_uniform

Deme = Callable[..., Result]
FEW = ["--points", 3, "--num", 16, "--report-num", 16]
THREE = ["base.safetensors", "ft_1of4.safetensors", "ft_4of4.safetensors"]


def test_the_file_the_pictures_and_the_sentence(deme: Deme, run_folder: Path) -> None:
    mark = ["--mark", "ft_3of4.safetensors"]
    result = deme("analyze", "landscape", *THREE, *mark, "--data", "digits", "--json", *FEW)
    assert result.exit_code == 0, result.exception
    told = json.loads(result.stdout)
    assert told["paths"] == ["landscape.json", "landscape.png", "landscape.svg"]
    assert all(Path(path).stat().st_size for path in told["paths"])
    document = json.loads(Path("landscape.json").read_text())
    assert document["kind"] == "landscape"
    assert document["reading"] == told["reading"]
    assert "on the plane of base, ft_1of4 and ft_4of4, " in document["reading"]
    assert told["reading"] in result.stderr
    assert document["protocol"]["along"] == "vectors"
    assert [one["timesteps"] for one in document["losses"]] == [
        "0:100", "0:25", "50:75", "75:100",
    ]  # fmt: skip
    assert [seen["name"] for seen in document["models"]] == [
        "base", "ft_1of4", "ft_4of4", "ft_3of4",
    ]  # fmt: skip
    assert document["models"][3]["distance_from_landscape"] > 0
    for name in ("origin", "lowest", "models"):
        assert told[name] == document[name]
    assert [len(axis["values"]) for axis in document["axes"]] == [3, 3]
    assert not list(Path().glob(".landscape*"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--along", "line"], ConfigError, "--along line: takes two models, its ends; 1 given"),
        (["--along", "round"], ConfigError, "expected one of random, line, vectors, pca"),
        (["--along", "random", *THREE], ConfigError, "takes one model, the origin; 3 given"),
        (["--mark", "base.safetensors"], ConfigError, "--mark: models are marked on the plane"),
        (["--points", 2], ConfigError, "points = 2: needs at least 3"),
        (["--num", 1], ConfigError, "num = 1: needs at least 2"),
        (["--jobs", 0], ConfigError, "jobs = 0: expected a number above 0"),
        (["--span", 0], ConfigError, "span = 0"),
        (["-n", 101], ConfigError, "cannot divide 100 timesteps into 101 ranges"),
        (["--split", "test"], ConfigError, "--split test: expected one of train, held-out"),
        (["-o", "x.png"], ConfigError, "ends in .json"),
        (["-o", "taken.json"], ConfigError, "taken.json exists; add --force"),
        (["--data", ""], ConfigError, "no images"),
        (["none.safetensors"], MissingError, "no such file"),
        ([THREE[0], THREE[1], THREE[1]], ArtifactError, "span no plane: their cosine is 1.000000"),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    deme: Deme, run_folder: Path, arguments: list, error: type, message: str
) -> None:
    Path("taken.json").write_text("{}")
    before = sorted(Path().iterdir())
    data = [] if "--data" in arguments else ["--data", "digits"]
    result = deme("analyze", "landscape", *data, *arguments)
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)
    assert sorted(Path().iterdir()) == before


def test_a_dry_run_writes_nothing(deme: Deme, run_folder: Path) -> None:
    before = sorted(Path().iterdir())
    result = deme("analyze", "landscape", "--data", "digits", "--dry-run", "-n", 2)
    assert result.exit_code == 0
    assert (
        "random, base.safetensors: 441 points of 2,048 draws from digits (train)" in result.stderr
    )
    assert "each of 0:50, 50:100" in result.stderr
    assert sorted(Path().iterdir()) == before


def test_latents_classes_and_flow_are_measured_too(
    deme: Deme, pipelines: Callable[..., Path], image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(image_folder.parent)
    rows = [json.dumps({"file_name": f"{i:02d}.png", "text": f"thing {i}"}) for i in range(10)]
    (image_folder / "metadata.jsonl").write_text("\n".join(rows))
    few = ["--points", 3, "--num", 16, "--report-num", 16, "-n", 2, "--json"]
    result = deme("analyze", "landscape", pipelines("sd3"), "--data", image_folder, *few)
    assert result.exit_code == 0, result.exception
    told = json.loads(result.stdout)
    assert sum(row["draws"] for row in told["origin"][1:]) == 16


def test_ranges_are_those_asked_for_or_of_the_split_or_of_the_experts() -> None:
    quarters, own = split_uniform(4, 100), [TimestepRange(0, 30), TimestepRange(0, 100)]
    known = {"default_n": 4, "num_train_timesteps": 100}
    assert choose_ranges(2, quarters, own, **known) == split_uniform(2, 100)
    assert choose_ranges(None, quarters, quarters[:1], **known) == quarters
    assert choose_ranges(None, quarters, own, **known) == own[:1]
    assert choose_ranges(None, [], [], **known) == quarters
    with pytest.raises(ConfigError, match="0:200 reaches past the 100 timesteps of this model"):
        choose_ranges(None, [TimestepRange(0, 200)], [], **known)
