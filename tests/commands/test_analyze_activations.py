"""`deme analyze activations` finds the base, tells what changed, refuses what it cannot tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_base
from typer.testing import Result

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.diffusion.checkpoints import base_record, import_model
from deme_cli.errors import ArtifactError, ConfigError, MissingError

Deme = Callable[..., Result]
COMMAND = ("analyze", "activations")
FEW = ("--data", "digits", "--num", 4, "--controls", 1)


def project(path: Path) -> None:
    """Give the tiny expert block projections, 1.5 times the identity."""
    weights = load_tensors(path)
    for block, width in (("down_blocks_0", 8), ("down_blocks_1", 16), ("mid_block", 16),
                         ("up_blocks_0", 16), ("up_blocks_1", 8)):  # fmt: skip
        weights[f"channel_projection.{block}.weight"] = torch.eye(width) * 1.5
    write_artifact(path, weights, read_record(path, "expert"))


def test_the_file_the_pictures_and_the_sentence(deme: Deme, run_folder: Path) -> None:
    project(Path("ft_1of4.safetensors"))
    result = deme(*COMMAND, "ft_1of4.safetensors", "--json", "--block", "up_blocks.1", *FEW)
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    assert document["paths"] == [f"activations.{kind}" for kind in ("json", "png", "svg")]
    assert all(Path(path).stat().st_size for path in document["paths"])
    file = json.loads(Path("activations.json").read_text())
    assert file["protocol"]["base"]["source"] == "base.safetensors"
    assert file["protocol"]["range"] == "0:25"
    assert (file["drawn"]["name"], file["drawn"]["grid"]) == ("up_blocks.1", [8, 8])
    assert [block["projection"]["relative"] for block in file["blocks"]] == [0.5] * 5
    shares = [block["shares"]["channel"] for block in file["blocks"]]
    assert document["shares"]["channel"] == pytest.approx(sum(shares) / 5)
    of_controls = [block["controls"]["shares"]["channel"] for block in file["blocks"]]
    assert document["controls"] == file["controls"]
    assert [one["shares"]["channel"] for one in file["controls"]] == [
        pytest.approx(sum(of_controls) / 5)
    ]
    assert document["reading"] == file["reading"]
    assert document["reading"] in result.stderr
    assert "ft_1of4 changed the features of base at timesteps 0:25 by" in document["reading"]
    assert not list(Path().glob(".activations*"))


def test_a_dry_run_writes_nothing_and_takes_other_ranges(deme: Deme, run_folder: Path) -> None:
    before = sorted(Path().iterdir())
    pair = ("base.safetensors", "ft_1of4.safetensors")
    for given, told in ((), "0:25"), (("--range", "3/4"), "50:75"), (("--range", "all"), "0:100"):
        result = deme(*COMMAND, *pair, "--dry-run", *FEW, *given)
        assert result.exit_code == 0, result.exception
        assert f"ft_1of4 against base: 4 draws of {told} from digits" in result.stderr
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["ft_1of4.safetensors", "--num", 1], ConfigError, "needs at least 2 draws"),
        (["ft_1of4.safetensors", "--controls", -1], ConfigError, "controls = -1: expected 0 or"),
        (["ft_1of4.safetensors", "--range", "50:200"], ConfigError, "stop <= 100"),
        (["ft_1of4.safetensors", "--block", "midblock"], ConfigError, "did you mean 'mid_block'"),
        (["ft_1of4.safetensors", "--data", ""], ConfigError, "no images"),
        (["ft_1of4.safetensors", "-o", "taken.json"], ConfigError, "add --force"),
        (["base.safetensors"] * 3, ConfigError, "3 models given: expected [BASE] EXPERT"),
        (["base.safetensors"], ArtifactError, "found 'base'; name both: deme analyze"),
        (["none.safetensors"], MissingError, "no such file; name BASE and EXPERT"),
        (["base.safetensors", "none.safetensors"], MissingError, "no such file"),
        (["base.safetensors"] * 2, ArtifactError, "have the same weights"),
        (
            ["wide.safetensors", "ft_1of4.safetensors"],
            ArtifactError,
            "ft_1of4.safetensors: block_out_channels of its model_config is [8, 16], "
            "wide.safetensors has [16, 16]",
        ),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    deme: Deme, run_folder: Path, arguments: list, error: type, message: str
) -> None:
    Path("taken.json").write_text("{}")
    write_tiny_base(Path("wide.safetensors"), block_out_channels=[16, 16])
    before = sorted(Path().iterdir())
    data = [] if "--data" in arguments else ["--data", "digits"]
    result = deme(*COMMAND, *data, *arguments)
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)
    assert sorted(Path().iterdir()) == before


def test_an_expert_alone_without_its_base_is_asked_for_it(deme: Deme, run_folder: Path) -> None:
    Path("base.safetensors").unlink()
    result = deme(*COMMAND, "ft_1of4.safetensors", *FEW)
    assert isinstance(result.exception, MissingError)
    assert str(result.exception).endswith(
        "name both: deme analyze activations BASE ft_1of4.safetensors"
    )
    assert "--base" not in str(result.exception)


def test_tokens_classes_and_blocks_before_any_change_are_shown_too(
    deme: Deme, pipelines: Callable[..., Path], image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(image_folder.parent)
    rows = [json.dumps({"file_name": f"{i:02d}.png", "label": i % 5}) for i in range(10)]
    (image_folder / "metadata.jsonl").write_text("\n".join(rows))
    model = import_model(str(pipelines("dit")))
    changed = {
        name: weight * (1.05 if name.startswith("transformer_blocks.1") else 1)
        for name, weight in model.weights.items()
    }
    write_artifact(Path("changed.safetensors"), changed, base_record(model))
    result = deme(
        *COMMAND, pipelines("dit"), "changed.safetensors", "--data", image_folder, "--num", 2,
        "--split", "train", "--controls", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    file = json.loads(Path("activations.json").read_text())
    first = file["blocks"][0]
    assert (first["name"], first["size"]) == ("transformer_blocks.0", 0)
    assert first["shares"] == {"channel": None, "place": None, "rest": None}
    assert (file["drawn"]["name"], file["drawn"]["grid"]) == ("transformer_blocks.1", [4, 4])
    assert file["protocol"]["range"] == "0:1000"
    assert (file["controls"], first["controls"]) == ([], None)
