"""`sample` and `ensemble-sample`: what they write, refuse, keep and resume."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import Result

import deme_cli
from deme_cli.artifacts import fingerprint_file, read_record, write_artifact
from deme_cli.config import SampleConfig
from deme_cli.console import Step
from deme_cli.data.images import open_images
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.errors import Stopped
from deme_cli.files import read_header
from deme_cli.sampling.sampler import image_seed
from deme_cli.sampling.store import grid

Deme = Callable[..., Result]
Refuse = Callable[..., None]
BASE, OUTPUT = Path("base.safetensors"), Path("out.safetensors")
FEW = ("--steps", 4, "-b", 2)
PROMPTS = ["a red fox", "a cat\u2028and a dog", "Zürich by night"]


def succeed(result: Result) -> Result:
    assert result.exception is None, result.exception
    assert result.exit_code == 0
    return result


def document_of(result: Result) -> dict:
    return json.loads(succeed(result).stdout)


def images_of(path: Path) -> np.ndarray:
    return load_file(path)["images"]


def pixels_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_sample_writes_exactly_n_images_with_seeds_and_protocol(
    run_folder: Path, deme: Deme
) -> None:
    """Into an artifact, and into a folder of PNG files."""
    command = ["sample", BASE, "-n", 7, "--steps", 4, "-b", 3, "--seed", 5]
    result = succeed(deme(*command))
    assert result.stdout.split() == ["base-samples.safetensors", "base-samples.png"]
    path = Path("base-samples.safetensors")
    tensors = load_file(path)
    assert (tensors["images"].shape, tensors["images"].dtype) == ((7, 8, 8, 1), np.uint8)
    assert tensors["seeds"].tolist() == [image_seed(5, index) for index in range(7)]
    record = read_record(path, "samples")
    assert record.fingerprint == fingerprint_file(path)
    assert record.protocol["fingerprints"] == [read_record(BASE).fingerprint]
    assert (record.protocol["num"], record.protocol["seed"]) == (7, 5)
    assert list(read_header(path).tensors) == ["seeds", "images"]
    assert not list(Path(".").glob(".*"))
    assert succeed(deme(*command, "-o", "drawn")).stdout.split() == ["drawn", "drawn.png"]
    assert sorted(os.listdir("drawn")) == [*(f"{i:06d}.png" for i in range(7)), "samples.json"]
    assert np.array_equal(pixels_of(Path("drawn")), tensors["images"][..., 0])
    assert json.loads(Path("drawn/samples.json").read_text())["protocol"] == record.protocol
    assert Path("drawn.png").read_bytes() == Path("base-samples.png").read_bytes()


def test_a_diffusers_folder_draws_what_its_artifact_draws(run_folder: Path, deme: Deme) -> None:
    record = read_record(BASE, "base")
    network = load_denoiser(BASE).network
    scheduler = DDPMScheduler.from_config(record.scheduler_config)
    DDPMPipeline(network, scheduler).save_pretrained("pipeline")
    succeed(deme("sample", "pipeline", "-n", 2, "--steps", 4))
    succeed(deme("sample", BASE, "-n", 2, "--steps", 4, "-o", OUTPUT))
    drawn = Path("pipeline-samples.safetensors")
    assert np.array_equal(images_of(drawn), images_of(OUTPUT))
    assert read_record(drawn).protocol["fingerprints"] == [record.fingerprint]


def test_a_grid_holds_every_image_with_a_gap_of_two_pixels() -> None:
    """Small ones enlarged, large ones reduced to the means of squares."""
    images = np.random.default_rng(0).integers(0, 200, (6, 100, 100, 3), dtype=np.uint8)
    sheet = grid(images)
    assert sheet.shape == (2 * 102 + 2, 3 * 102 + 2, 3)
    assert np.array_equal(sheet[104:204, 206:306], images[5])
    assert (sheet[102:104] == 255).all()
    small = grid(images[:5, :8, :8, :1])
    scale = (small.shape[1] - 4 * 2) // (3 * 8)
    assert small.shape[1] >= 256
    first = small[2 : 2 + 8 * scale : scale, 2 : 2 + 8 * scale : scale]
    assert np.array_equal(first, images[0, :8, :8, :1])
    assert (small[-8 * scale :, -8 * scale :] == 255).all()
    large = images[:, :1, :1].repeat(5, axis=1).repeat(1000, axis=2)
    large[0, :2, :2] = [[[7], [9]]] * 2
    sheet = grid(np.concatenate([large, large[:3]]))
    assert sheet.shape == (3 * 4 + 2, 3 * 502 + 2, 3)
    assert (sheet[2, 2] == 8).all()


def test_an_existing_output_is_replaced_only_by_force(
    run_folder: Path, deme: Deme, refuse: Refuse
) -> None:
    for output in ("out.safetensors", "drawn"):
        command = ["sample", BASE, "-n", 2, "--steps", 2, "-o", output]
        succeed(deme(*command))
        refuse(2, "exists", *command)
        succeed(deme(*command, "--seed", 1, "--force"))
    assert np.array_equal(pixels_of(Path("drawn")), images_of(OUTPUT)[..., 0])
    assert read_record(OUTPUT).protocol["seed"] == 1
    for card in (None, "{", "[]", '{"protocol": []}', "[" * 100_000):
        Path("drawn/samples.json").write_text(card or "")
        if card is None:
            Path("drawn/samples.json").unlink()
        refuse(2, "without samples.json", *command)
    Path("drawn/cat.jpg").write_bytes(b"")
    refuse(2, "cat.jpg", *command, "--force")
    Path("new.png").write_bytes(b"mine")
    refuse(2, "new.png exists", *command[:-1], "new")
    assert Path("new.png").read_bytes() == b"mine"


def test_a_folder_is_extended_and_what_is_broken_or_missing_is_drawn_again(
    run_folder: Path, deme: Deme, refuse: Refuse
) -> None:
    options = [*FEW, "-o", "drawn"]
    succeed(deme("sample", BASE, "-n", 3, *options))
    succeed(deme("sample", BASE, "-n", 6, *options))
    succeed(deme("sample", BASE, "-n", 6, *FEW, "-o", OUTPUT))
    pixels = pixels_of(Path("drawn"))
    assert np.array_equal(pixels, images_of(OUTPUT)[..., 0])
    refuse(2, "6 images", "sample", BASE, "-n", 4, *options)
    refuse(2, "seed = 0", "sample", BASE, "-n", 9, *options, "--seed", 1)
    Path("drawn/000003.png").write_bytes(Path("drawn/000003.png").read_bytes()[:30])
    Path("drawn/000004.png").unlink()
    assert document_of(deme("sample", BASE, "-n", 6, *options, "--json"))["kept"] == 2
    assert np.array_equal(pixels_of(Path("drawn")), pixels)


def test_an_unfinished_artifact_is_resumed_at_a_whole_batch_and_never_mixed(
    run_folder: Path, deme: Deme, refuse: Refuse
) -> None:
    """What a crash leaves: the card, and images cut anywhere."""
    command = ["sample", BASE, "-n", 7, *FEW, "-o", OUTPUT]
    succeed(deme(*command, "--json"))
    whole, images = OUTPUT.read_bytes(), images_of(OUTPUT).tobytes()
    line = json.dumps({"protocol": read_record(OUTPUT).protocol}).encode() + b"\n"
    unfinished = Path(".out.safetensors.unfinished")
    halves = b'{"protocol": {"mod', b'{"protocol": []}\n'
    cases = [(line + images[: 5 * 64 + 17], 4), (line + images, 7), *((half, 0) for half in halves)]
    for left, kept in cases:
        OUTPUT.unlink()
        Path("out.png").unlink()
        unfinished.write_bytes(left)
        assert document_of(deme(*command, "--json"))["kept"] == kept
        assert OUTPUT.read_bytes() == whole
        assert not list(Path(".").glob(".*"))
    OUTPUT.unlink()
    unfinished.write_bytes(line + images[: 4 * 64])
    refuse(2, "steps = 4, this run has 5", *command, "--steps", 5)
    succeed(deme(*command, "--steps", 5, "--force"))
    assert read_record(OUTPUT).protocol["steps"] == 5


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """A SIGHUP that is heard, also where pytest itself runs under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "exit_code", "output"),
    [("SIGTERM", 75, "out.safetensors"), ("SIGHUP", 75, "drawn"), ("SIGINT", 130, "drawn")],
)
def test_a_signal_keeps_what_is_finished_and_the_same_call_goes_on(
    run_folder: Path, deme: Deme, output: str, name: str, exit_code: int, as_in_a_terminal: None
) -> None:
    config, steps = SampleConfig(num=7, steps=4, batch_size=2), []

    def watch(step: Step) -> None:
        steps.extend([step] if step.label == "sampling" else [])
        if len(steps) == 11:  # in the middle of the third batch
            signal.raise_signal(getattr(signal, name))

    with pytest.raises(Stopped, match=r"4 of 7 images .* run the same command again") as caught:
        deme_cli.sample(BASE, config, output=Path(output), progress=watch)
    assert len(steps) == 11
    assert caught.value.exit_code == exit_code
    command = ["sample", BASE, "-n", 7, *FEW]
    assert document_of(deme(*command, "-o", output, "--json"))["kept"] == 4
    succeed(deme(*command))
    images = pixels_of(Path(output)) if output == "drawn" else images_of(Path(output))[..., 0]
    assert np.array_equal(images, images_of(Path("base-samples.safetensors"))[..., 0])


def test_what_cannot_be_drawn_is_refused_by_name(run_folder: Path, refuse: Refuse) -> None:
    for words, exit_code, fault in [
        ("sample base.safetensors --steps 101 --dry-run", 2, "1 to 100"),
        ("sample base.safetensors --protocol none", 2, "--protocol none"),
        ("sample nowhere.safetensors", 3, "nowhere.safetensors"),
        ("ensemble-sample ft_2of4.safetensors", 4, "no expert covers timesteps 0:25"),
    ]:
        refuse(exit_code, fault, *words.split())


def test_a_dry_run_checks_and_writes_nothing(run_folder: Path, deme: Deme) -> None:
    """Settings come from deme.toml unless they are given. A lone expert draws with a warning."""
    Path("deme.toml").write_text("[sample]\nnum = 3\nsteps = 4\n")
    experts = sorted(Path(".").glob("ft_*.safetensors"))
    result = succeed(deme("ensemble-sample", *experts, "--steps", 5, "--dry-run"))
    assert result.stdout == ""
    assert "would draw 3 images (8 x 8, 1 channels) to ensemble.safetensors" in result.stderr
    document = document_of(deme("sample", experts[1], "--steps", 5, "--dry-run", "--json"))
    assert document["dry_run"] is True
    card = document["protocol"]
    assert (card["num"], card["steps"], card["ranges"]) == (3, 5, [[0, 100]])
    assert "expert of timesteps 25:50" in deme("sample", experts[1], "--dry-run").stderr
    assert not list(Path(".").glob("*samples*")) + list(Path(".").glob("ensemble*"))


@pytest.fixture
def sd(pipelines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Stable Diffusion; the current folder is empty but for prompts.json."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.json").write_text(json.dumps(PROMPTS))
    return pipelines("sd")


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


def test_classes_are_kept_and_a_folder_of_them_is_extended(
    pipelines: Callable[..., Path], deme: Deme, refuse: Refuse, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = ["sample", pipelines("dit"), "--classes", "3,7", *FEW, "-o", "drawn"]
    succeed(deme(*command, "-n", 3))
    succeed(deme(*command, "-n", 5))
    data = open_images("drawn", shape=None, split="all", wants="class")
    assert data.labels(range(5)) == [3, 7, 3, 7, 3]
    document = document_of(deme(*command, "-n", 5, "-o", "out.safetensors", "--json"))
    assert document["protocol"]["classes"] == "3,7"
    assert read_record(OUTPUT).classes == [3, 7, 3, 7, 3]
    assert np.array_equal(pixels_of(Path("drawn")), images_of(OUTPUT))
    refuse(2, "classes = 3,7", *command, "--classes", "3", "-n", 9)


def test_settings_and_pipeline_of_deme_toml_are_seen_from_its_folder(
    sd: Path, deme: Deme, refuse: Refuse, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    denoiser = open_denoiser(str(sd))
    moved = replace(denoiser.record, source="elsewhere")
    write_artifact(run / "base.safetensors", denoiser.network.state_dict(), moved)
    Path("prompts.json").rename(run / "prompts.json")
    (run / "deme.toml").write_text('[sample]\nprompts = "prompts.json"\nguidance = 2.0\n')
    command = ["sample", run / "base.safetensors", "--config", run / "deme.toml", "--dry-run"]
    refuse(3, "elsewhere", *command)
    refuse(3, "whole pipeline", *command, "--pipeline", tmp_path)
    (run / "pipeline").symlink_to(sd)
    with (run / "deme.toml").open("a") as file:
        file.write('[model]\npipeline = "pipeline"\n')
    assert "run/prompts.json, guidance 2" in succeed(deme(*command)).stderr
    document = document_of(deme(*command, "--prompt", "a fox", "-n", 2, "--json"))
    assert document["protocol"]["prompts"]["source"] == "text:a fox"


def test_what_does_not_fit_prompts_is_refused_by_name(
    sd: Path, deme: Deme, refuse: Refuse, cache: Path
) -> None:
    for options, exit_code, fault in [
        (["--prompt", "a", "--prompts", "prompts.json"], 2, "one of the two"),
        (["--prompts", "nowhere.txt"], 3, "nowhere.txt"),
        (["--prompt", "a", "--resolution", "13"], 2, "resolution = 13"),
        (["--prompts", "parti"], 3, "PartiPrompts"),
        (["--protocol", "imagenet", "--steps", 5], 2, "--steps 5: the protocol imagenet has 25"),
        (["--protocol", "imagenet", "--prompt", "a fox"], 2, "--prompts text:a fox"),
    ]:
        refuse(exit_code, fault, "sample", sd, *options, "--dry-run")
    document = document_of(deme("sample", sd, "--protocol", "imagenet", "--dry-run", "--json"))
    card = document["protocol"]
    assert (card["num"], card["sampler"], card["steps"]) == (50_000, "pndm", 25)
    assert (card["guidance"], card["resolution"], card["resize_to"]) == (7.5, 512, 256)
    assert card["prompts"]["template"] == "a photo of a {}"
