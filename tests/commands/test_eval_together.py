"""`eval` and `stats` in several processes: the figures of one, digit for digit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import ends, launch, stop_when, succeed
from tiny_clip import write_clip
from tiny_pipelines import stable_diffusion
from typer.testing import Result

from deme_cli.data.digits import DIGIT_CAPTIONS

Deme = Callable[..., Result]
pytestmark = pytest.mark.slow


def test_distances_of_three_processes_are_those_of_one(run_folder: Path, deme: Deme) -> None:
    drawn = deme("sample", "base.safetensors", "-n", 25, "--steps", 3, "-o", "drawn.safetensors")
    assert drawn.exit_code == 0, drawn.exception
    experts = sorted(path.name for path in run_folder.glob("ft_*.safetensors"))
    words = [
        "eval", "base.safetensors", *experts, "drawn.safetensors", "--fid", "digits", "--kid",
        "digits", "-n", 25, "--repeats", 2, "-b", 4, "--steps", 3, "--device", "cpu", "--json",
    ]  # fmt: skip
    found = json.loads(succeed(launch(run_folder, *words, "-o", "figures.json", num=3)))
    assert found == json.loads(deme(*words).stdout)
    assert found == json.loads(Path("figures.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["base", "ensemble", "drawn"]
    assert not list(run_folder.glob(".deme-eval*"))


def test_scores_of_two_processes_are_those_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deme: Deme
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = stable_diffusion(tmp_path / "tiny")
    lines = "".join(f"{DIGIT_CAPTIONS[c]},{c}\n" for c in range(7))
    Path("prompts.csv").write_text(f"prompt,class\n{lines}")
    words = [
        "eval", pipeline, "--clip-score", "--clip-weights", f"local-dir:{write_clip(Path('clip'))}",
        "--prompts", "prompts.csv", "--steps", 2, "-b", 2, "--device",
        "cpu", "--json",
    ]  # fmt: skip
    found = json.loads(succeed(launch(tmp_path, *words)))
    assert found == json.loads(deme(*words).stdout)
    assert set(found["rows"][0]["metrics"]) == {"clip_score"}


def test_the_gate_ends_all_processes_with_6_and_images_of_another_machine_with_2(
    run_folder: Path, image_folder: Path
) -> None:
    words = ["eval", "base.safetensors", "--fid", "digits", "-n", 9, "-b", 2, "--steps", 2]
    codes, (said,) = ends(launch(run_folder, *words, "--max-fid", 0.001, "--device", "cpu"))
    assert codes == [6, 6]
    assert "above --max-fid 0.001: base" in said
    there = image_folder.parent / "there" / image_folder.name
    shutil.copytree(image_folder, there)
    (there / "09.png").unlink()
    words = ["stats", "images", "--features", "digits", "-o", "new.safetensors", "--device", "cpu"]
    codes, (said,) = ends(launch(image_folder.parent, *words, machines=[".", "there"]))
    assert codes == [2, 2]
    assert "process 1 has images in images = 9, the first one 10" in said


def test_what_two_processes_have_measured_one_goes_on_with(run_folder: Path, deme: Deme) -> None:
    words = [
        "eval", "base.safetensors", "ft_1of4.safetensors", "--fid", "digits", "-n", 40,
        "--repeats", 3, "-b", 4, "--steps", 20, "--device", "cpu", "--json",
    ]  # fmt: skip
    codes, (said,) = stop_when(
        lambda: bool(list(run_folder.glob(".deme-eval*.json"))), launch(run_folder, *words), rank=1
    )
    assert codes == [75, 75]
    assert "measurements are kept" in said
    (ledger,) = run_folder.glob(".deme-eval*.json")
    assert len(json.loads(ledger.read_text())) >= 1
    resumed = json.loads(deme(*words).stdout)
    assert not ledger.exists()
    assert resumed == json.loads(deme(*words).stdout)


def test_statistics_of_two_processes_are_those_of_one(run_folder: Path, deme: Deme) -> None:
    words = ["stats", "digits", "-b", 50, "--device", "cpu"]
    assert succeed(launch(run_folder, *words, "-o", "two.safetensors")) == "two.safetensors\n"
    assert deme(*words, "-o", "one.safetensors").exit_code == 0
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
