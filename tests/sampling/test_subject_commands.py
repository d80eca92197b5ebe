"""`deme sample` and `deme ensemble-sample` with prompts and classes: kept, resumed, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import Result

from deme_cli.artifacts import BaseRecord, ExpertRecord, read_record, write_artifact
from deme_cli.data.images import open_images
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.sampling.sampler import image_seed
from deme_cli.timesteps import split_uniform

Deme = Callable[..., Result]
FEW = ("--steps", 4, "-b", 2)
PROMPTS = ["a red fox", "a cat\u2028and a dog", "Zürich by night"]


def succeed(result: Result) -> Result:
    assert result.exception is None, result.exception
    assert result.exit_code == 0
    return result


def refuse(result: Result, exit_code: int, *words: str) -> None:
    assert getattr(result.exception, "exit_code", None) == exit_code, result.exception
    for word in words:
        assert word in str(result.exception)


@pytest.fixture
def sd(pipelines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Stable Diffusion; the current folder is empty but for prompts.json."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.json").write_text(json.dumps(PROMPTS))
    return pipelines("sd")


@pytest.fixture
def dit(pipelines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return pipelines("dit")


def write_experts(folder: Path) -> list[str]:
    """The denoiser of a pipeline as base.safetensors, and three times as an expert of it."""
    denoiser = open_denoiser(str(folder))
    weights = denoiser.network.state_dict()
    base = write_artifact(Path("base.safetensors"), weights, denoiser.record)
    assert isinstance(base, BaseRecord)
    fields = {name: value for name, value in asdict(base).items() if name not in ("training",)}
    paths = []
    for index, span in enumerate(split_uniform(3, 1000), 1):
        expert = ExpertRecord(
            **fields, range=[span.start, span.stop], index=index, of=3, base=base.fingerprint,
            p=0.3, steps=0, seed=0, projection="none", data={}, training={},
        )  # fmt: skip
        paths.append(f"ft_{index}of3.safetensors")
        write_artifact(Path(paths[-1]), weights, expert)
    return paths


def test_images_are_kept_with_their_prompts(sd: Path, deme: Deme) -> None:
    succeed(deme("sample", sd, "--prompts", "prompts.json", *FEW, "-o", "out.safetensors"))
    record = read_record(Path("out.safetensors"), "samples")
    assert record.prompts == PROMPTS
    assert (record.protocol["num"], record.protocol["guidance"]) == (3, 7.5)
    assert load_file("out.safetensors")["images"].shape == (3, 16, 16, 3)


def test_a_folder_of_images_can_be_trained_on(sd: Path, deme: Deme) -> None:
    command = ["sample", sd, "--prompts", "prompts.json", *FEW, "--seed", 5, "-o", "drawn"]
    succeed(deme(*command))
    lines = Path("drawn/metadata.jsonl").read_text("utf-8").split("\n")
    assert json.loads(lines[1]) == {
        "file_name": "000001.png", "text": PROMPTS[1], "seed": image_seed(5, 1),
    }  # fmt: skip
    data = open_images("drawn", shape=(3, 16, 16), split="all", wants="text")
    assert list(data.captions(range(3))) == PROMPTS
    succeed(deme(*command, "--force", "--prompts", "text:a fox", "-n", 2))
    data = open_images("drawn", shape=(3, 16, 16), split="all", wants="text")
    assert data.captions(range(2)) == ["a fox"] * 2


def test_classes_are_kept_and_a_folder_of_them_is_extended(dit: Path, deme: Deme) -> None:
    command = ["sample", dit, "--classes", "3,7", *FEW, "-o", "drawn"]
    succeed(deme(*command, "-n", 3))
    succeed(deme(*command, "-n", 5))
    data = open_images("drawn", shape=None, split="all", wants="class")
    assert data.labels(range(5)) == [3, 7, 3, 7, 3]
    whole = succeed(deme(*command, "-n", 5, "-o", "out.safetensors", "--json"))
    assert json.loads(whole.stdout)["protocol"]["classes"] == "3,7"
    assert read_record(Path("out.safetensors")).classes == [3, 7, 3, 7, 3]
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(Path("drawn").glob("*.png"))])
    assert np.array_equal(pixels, load_file("out.safetensors")["images"])
    refuse(deme("sample", dit, "--classes", "3", *FEW, "-n", 9, "-o", "drawn"), 2, "classes = 3,7")


def test_identical_experts_draw_what_their_base_draws(sd: Path, deme: Deme) -> None:
    experts = write_experts(sd)
    options = ["--prompts", "prompts.json", "--resize-to", 12, "--sampler", "pndm", *FEW]
    succeed(deme("sample", "base.safetensors", *options, "-o", "one.safetensors"))
    succeed(deme("ensemble-sample", *experts, *options, "--hold-one"))
    ensemble = Path("ensemble.safetensors")
    assert read_record(ensemble).prompts == PROMPTS
    images = load_file(ensemble)["images"]
    assert images.shape == (3, 12, 12, 3)
    assert np.array_equal(images, load_file("one.safetensors")["images"])


def test_settings_and_pipeline_of_deme_toml_are_seen_from_its_folder(
    sd: Path, deme: Deme, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    record = open_denoiser(str(sd)).record
    moved = replace(record, source="elsewhere")
    write_artifact(run / "base.safetensors", open_denoiser(str(sd)).network.state_dict(), moved)
    Path("prompts.json").rename(run / "prompts.json")
    (run / "deme.toml").write_text('[sample]\nprompts = "prompts.json"\nguidance = 2.0\n')
    command = ["sample", run / "base.safetensors", "--config", run / "deme.toml", *FEW]
    refuse(deme(*command), 3, "elsewhere", "--pipeline")
    refuse(deme(*command, "--pipeline", tmp_path), 3, "whole pipeline")
    result = succeed(deme(*command, "--pipeline", sd, "--json"))
    assert json.loads(result.stdout)["protocol"]["guidance"] == 2
    (run / "pipeline").symlink_to(sd)
    with (run / "deme.toml").open("a") as file:
        file.write('[model]\npipeline = "pipeline"\n')
    result = succeed(deme(*command, "--prompt", "a fox", "-n", 2, "--force", "--json"))
    assert json.loads(result.stdout)["protocol"]["prompts"]["source"] == "text:a fox"
    shown = succeed(deme(*command, "--force", "--dry-run")).stderr
    assert "run/prompts.json, guidance 2" in shown


def test_a_protocol_fixes_what_is_drawn(sd: Path, deme: Deme) -> None:
    command = ["sample", sd, "--protocol", "imagenet", "--dry-run"]
    refuse(deme(*command, "--steps", 4), 2, "--steps 4", "imagenet", "25")
    refuse(deme(*command, "--resize-to", 4), 2, "--resize-to 4")
    refuse(deme(*command, "--prompt", "a fox"), 2, "--prompts text:a fox")
    refuse(deme("sample", sd, "--protocol", "none"), 2, "--protocol none")
    card = json.loads(succeed(deme(*command, "--json")).stdout)["protocol"]
    assert (card["num"], card["sampler"], card["steps"]) == (50_000, "pndm", 25)
    assert (card["guidance"], card["resolution"], card["resize_to"]) == (7.5, 512, 256)
    assert card["prompts"]["template"] == "a photo of a {}"


@pytest.mark.parametrize(
    ("options", "exit_code", "fault"),
    [
        ([], 2, "--prompts FILE"),
        (["--prompt", "a", "--prompts", "prompts.json"], 2, "one of the two"),
        (["--prompt", "a", "--classes", "1"], 2, "classes = '1'"),
        (["--prompts", "prompts.json", "-n", 4], 2, "3 prompts"),
        (["--prompts", "nowhere.txt"], 3, "nowhere.txt"),
        (["--prompts", "prompts.json", "--prompt-column", "text"], 2, "column"),
        (["--prompt", "a", "--resolution", "13"], 2, "resolution = 13"),
        (["--prompt", "a", "--guidance", "-1"], 2, "guidance"),
        (["--prompt", "a", "--resize-to", "0"], 2, "resize"),
        (["--prompts", "parti"], 3, "PartiPrompts"),
    ],
)
def test_wrong_options_are_refused_by_name(
    sd: Path, deme: Deme, cache: Path, options: list[object], exit_code: int, fault: str
) -> None:
    refuse(deme("sample", sd, *options, *FEW), exit_code, fault)
    assert not list(Path(".").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--prompt", "a fox"], "prompts"),
        (["--classes", "1"], "classes"),
        (["--guidance", "3"], "guidance"),
    ],
)
def test_models_drawn_from_noise_alone_refuse_what_they_cannot_follow(
    run_folder: Path, deme: Deme, options: list[str], fault: str
) -> None:
    refuse(deme("sample", "base.safetensors", *options), 2, fault)
    experts = sorted(Path(".").glob("ft_*.safetensors"))
    refuse(deme("ensemble-sample", *experts, *options), 2, fault)


def test_flow_models_refuse_other_samplers_and_spacings(
    pipelines: Callable[..., Path], deme: Deme
) -> None:
    command = ["sample", pipelines("sd3"), "--prompt", "a fox", "--dry-run"]
    refuse(deme(*command, "--sampler", "ddim"), 2, "ddim does not fit", "euler, heun")
    refuse(deme(*command, "--spacing", "leading"), 2, "spacing")
    assert "euler, 50 steps, prompts of" in succeed(deme(*command)).stderr
