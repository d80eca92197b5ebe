"""`deme analyze gradients` measures, tells, and is what `deme split --by gradient` reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from deme_cli.analysis.gradients.agreement import pair_cosines
from deme_cli.artifacts import read_record
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.training.affinity import read_affinity

Deme = Callable[..., Result]
FEW = ["--buckets", 4, "--num", 4, "-n", 2]


def test_the_file_the_pictures_and_the_sentence(deme: Deme, run_folder: Path) -> None:
    result = deme("analyze", "gradients", "--data", "digits", "--json", *FEW)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["paths"] == ["gradients.json", "gradients.png", "gradients.svg"]
    png, svg = (Path(path).read_bytes() for path in document["paths"][1:])
    assert png.startswith(b"\x89PNG")
    assert b"</svg>" in svg
    base = read_record(Path("base.safetensors"), "base")
    affinity = read_affinity(Path("gradients.json"), base.fingerprint)
    assert document["ranges"] == [str(span) for span in affinity.ranges]
    within, _ = pair_cosines(affinity, affinity.ranges)
    assert document["within"] == pytest.approx(within.mean())
    assert (affinity.num, affinity.data["source"]) == (4, "digits")
    assert f"2 ranges by gradient, {', '.join(document['ranges'])}: " in result.stderr
    assert json.loads(Path("gradients.json").read_text())["reading"] in result.stderr
    assert not list(Path().glob(".gradients*"))


def test_a_split_by_gradient_takes_the_measured_ranges(deme: Deme, run_folder: Path) -> None:
    deme("analyze", "gradients", "--data", "digits", *FEW)
    split = ["split", "base.safetensors", "-n", 2, "--by", "gradient", "--data", "digits"]
    document = json.loads(deme(*split, "--force", "--json").stdout)
    assert document["ranges"] == json.loads(Path("gradients.json").read_text())["ranges"]
    result = deme(*split, "-o", "other")
    assert isinstance(result.exception, MissingError)
    assert "deme analyze gradients base.safetensors --data digits -o other/gradients.json" in str(
        result.exception
    )
    assert deme(*split, "-o", "other", "--gradients", "gradients.json").exit_code == 0
    result = deme("split", "base.safetensors", "-o", "more", "--gradients", "x.json")
    assert "--gradients x.json is read by --by gradient alone" in str(result.exception)


def test_gradients_of_another_model_are_refused(deme: Deme, run_folder: Path) -> None:
    deme("analyze", "gradients", "ft_1of4.safetensors", "--data", "digits", *FEW)
    result = deme(
        "split", "base.safetensors", "--by", "gradient", "-n", 2, "--force", "--data", "digits"
    )
    assert isinstance(result.exception, ArtifactError)
    assert "measured on another model, ft_1of4.safetensors" in str(result.exception)
    Path("gradients.json").write_text("{")
    result = deme("split", "base.safetensors", "--by", "gradient", "--force")
    assert isinstance(result.exception, ArtifactError)
    assert "not valid JSON" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--buckets", 1], ConfigError, "needs at least 2 buckets"),
        (["--buckets", 101], ConfigError, "this model has 100 timesteps"),
        (["--num", 1], ConfigError, "needs at least 2 draws"),
        (["--buckets", 3, "-n", 4], ConfigError, "4 ranges of 3 buckets"),
        (["-o", "x.png"], ConfigError, "ends in .json"),
        (["-o", "taken.json"], ConfigError, "taken.json exists; add --force"),
        (["--data", ""], ConfigError, "no images"),
        (["--data", "nowhere"], MissingError, "nowhere"),
        (["--data", "digits", "none.safetensors"], MissingError, "no such file"),
        (["--config", "none.toml"], MissingError, "none.toml"),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    deme: Deme, run_folder: Path, arguments: list, error: type, message: str
) -> None:
    Path("taken.json").write_text("{}")
    before = sorted(Path().iterdir())
    data = [] if "--data" in arguments else ["--data", "digits"]
    result = deme("analyze", "gradients", *data, *arguments)
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)
    assert sorted(Path().iterdir()) == before


def test_without_a_base_the_model_is_asked_for(
    deme: Deme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = deme("analyze", "gradients", "--data", "digits")
    assert isinstance(result.exception, MissingError)
    assert "name a MODEL" in str(result.exception)


def test_a_dry_run_writes_nothing(deme: Deme, run_folder: Path) -> None:
    before = sorted(Path().iterdir())
    result = deme("analyze", "gradients", "--data", "digits", "--dry-run", *FEW)
    assert result.exit_code == 0
    assert "100 timesteps in 4 buckets, 16 draws from digits" in result.stderr
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("name", ["sd3", "dit"])
def test_latents_captions_classes_and_flow_are_measured_too(
    deme: Deme, pipelines: Callable[..., Path], image_folder: Path, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(image_folder.parent)
    rows = [
        json.dumps({"file_name": f"{i:02d}.png", "text": f"thing {i}", "label": i % 5})
        for i in range(10)
    ]
    (image_folder / "metadata.jsonl").write_text("\n".join(rows))
    result = deme(
        "analyze", "gradients", pipelines(name), "--data", image_folder, "--num", 2,
        "--buckets", 2, "-n", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    split = ["split", pipelines(name), "-n", 2, "--data", image_folder, "--force"]
    for by in ("gradient", "snr", "log-snr"):
        assert deme(*split, "--by", by).exit_code == 0


def test_the_group_lists_its_analyses(deme: Deme) -> None:
    shown = deme("analyze", "--help").stdout
    assert "gradients" in shown
    assert "Example: deme analyze losses" in shown
    assert "Example:" in deme("analyze", "gradients", "--help").stdout
