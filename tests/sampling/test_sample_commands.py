"""`deme sample` and `deme ensemble-sample`: what they write, refuse, keep and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_base
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import Result

import deme_cli
from deme_cli.artifacts import fingerprint_file, load_tensors, read_record, write_artifact
from deme_cli.config import SampleConfig
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.errors import Stopped
from deme_cli.files import read_header
from deme_cli.jobs import claim
from deme_cli.progress import Step
from deme_cli.sampling.sampler import image_seed
from deme_cli.sampling.store import grid

Deme = Callable[..., Result]
BASE, OUTPUT = Path("base.safetensors"), Path("out.safetensors")


def succeed(result: Result) -> Result:
    assert result.exception is None, result.exception
    assert result.exit_code == 0
    return result


def refuse(result: Result, exit_code: int, *words: str) -> None:
    assert getattr(result.exception, "exit_code", None) == exit_code, result.exception
    for word in words:
        assert word in str(result.exception)


def images_of(path: Path) -> np.ndarray:
    return load_file(path)["images"]


def pixels_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def experts() -> list[Path]:
    return sorted(Path(".").glob("ft_*.safetensors"))


def test_sample_writes_exactly_n_images_with_seeds_and_protocol(
    run_folder: Path, deme: Deme
) -> None:
    result = succeed(deme("sample", BASE, "-n", 7, "--steps", 4, "-b", 3, "--seed", 5))
    assert result.stdout.split() == ["base-samples.safetensors", "base-samples.png"]
    path = Path("base-samples.safetensors")
    tensors = load_file(path)
    assert tensors["images"].shape == (7, 8, 8, 1)
    assert tensors["images"].dtype == np.uint8
    assert tensors["seeds"].tolist() == [image_seed(5, index) for index in range(7)]
    record = read_record(path, "samples")
    assert record.fingerprint == fingerprint_file(path)
    base = read_record(BASE)
    assert record.protocol["fingerprints"] == [base.fingerprint]
    assert record.protocol["num"] == 7
    assert record.protocol["seed"] == 5
    assert list(read_header(path).tensors) == ["seeds", "images"]
    assert not list(Path(".").glob(".*"))


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


def test_json_is_one_document_with_paths_and_protocol(run_folder: Path, deme: Deme) -> None:
    result = succeed(deme("ensemble-sample", *experts(), "-n", 2, "--steps", 4, "--json"))
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["paths"] == ["ensemble.safetensors", "ensemble.png"]
    assert document["protocol"]["model"] == "ensemble"
    assert document["num"] == 2


def test_holding_one_expert_draws_the_same_images(run_folder: Path, deme: Deme) -> None:
    options = ["-n", 4, "--steps", 8, "-b", 2]
    succeed(deme("ensemble-sample", *experts(), *options))
    succeed(deme("ensemble-sample", *experts(), *options, "--hold-one", "-o", OUTPUT))
    assert np.array_equal(images_of(OUTPUT), images_of(Path("ensemble.safetensors")))


def test_the_preview_shows_the_first_images_enlarged(run_folder: Path, deme: Deme) -> None:
    succeed(deme("sample", BASE, "-n", 5, "--steps", 2, "-o", OUTPUT))
    with Image.open("out.png") as preview:
        assert preview.width >= 256
        sheet = np.asarray(preview)
    scale = (preview.width - 4 * 2) // (3 * 8)
    first = sheet[2 : 2 + 8 * scale : scale, 2 : 2 + 8 * scale : scale]
    assert np.array_equal(first, images_of(OUTPUT)[0, :, :, 0])


def sheet_of(images: np.ndarray) -> np.ndarray:
    return np.asarray(grid([Image.fromarray(image) for image in images]))


@pytest.mark.parametrize("shape", [(100, 100), (100, 100, 3)])
def test_a_grid_holds_every_image_with_a_gap_of_two_pixels(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 200, (6, *shape), dtype=np.uint8)
    sheet = sheet_of(images)
    assert sheet.shape == (2 * 102 + 2, 3 * 102 + 2, *shape[2:])
    assert np.array_equal(sheet[104:204, 206:306], images[5])
    assert (sheet[102:104] == 255).all()


def test_a_grid_of_large_images_shows_them_reduced() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 1001, 1000, 3), dtype=np.uint8)
    sheet = sheet_of(images)
    assert sheet.shape == (3 * 502 + 2, 3 * 502 + 2, 3)
    assert np.allclose(sheet[2, 2], images[0, :2, :2].mean(axis=(0, 1)), atol=0.51)


def test_a_folder_gets_numbered_png_files(run_folder: Path, deme: Deme) -> None:
    succeed(deme("sample", BASE, "-n", 3, "--steps", 4, "-o", OUTPUT))
    result = succeed(deme("sample", BASE, "-n", 3, "--steps", 4, "-o", "drawn"))
    assert result.stdout.split() == ["drawn", "drawn.png"]
    assert sorted(os.listdir("drawn")) == ["000000.png", "000001.png", "000002.png", "samples.json"]
    assert np.array_equal(pixels_of(Path("drawn")), images_of(OUTPUT)[..., 0])
    card = json.loads(Path("drawn/samples.json").read_text())["protocol"]
    assert card == read_record(OUTPUT).protocol


def test_three_channels_become_colour_files(run_folder: Path, deme: Deme) -> None:
    write_tiny_base(run_folder / "colour.safetensors", in_channels=3, out_channels=3)
    succeed(deme("sample", "colour.safetensors", "-n", 2, "--steps", 2, "-o", "drawn"))
    assert pixels_of(Path("drawn")).shape == (2, 8, 8, 3)


def test_an_existing_output_is_replaced_only_by_force(run_folder: Path, deme: Deme) -> None:
    for output in ("out.safetensors", "drawn"):
        command = ["sample", BASE, "-n", 2, "--steps", 2, "-o", output]
        succeed(deme(*command))
        refuse(deme(*command), 2, "exists", "--force")
        succeed(deme(*command, "--seed", 1, "--force"))
    assert np.array_equal(pixels_of(Path("drawn")), images_of(OUTPUT)[..., 0])
    assert read_record(OUTPUT).protocol["seed"] == 1


def test_a_picture_in_the_place_of_the_preview_is_not_overwritten(
    run_folder: Path, deme: Deme
) -> None:
    Path("out.png").write_bytes(b"mine")
    refuse(deme("sample", BASE, "-n", 2, "--steps", 2, "-o", OUTPUT), 2, "out.png exists")
    assert Path("out.png").read_bytes() == b"mine"


def test_a_folder_with_strange_images_is_refused_even_by_force(
    run_folder: Path, deme: Deme
) -> None:
    Path("drawn").mkdir()
    Path("drawn/cat.jpg").write_bytes(b"")
    command = ["sample", BASE, "-n", 2, "--steps", 2, "-o", "drawn", "--force"]
    refuse(deme(*command), 2, "cat.jpg")


@pytest.mark.parametrize("card", [None, "{", "[]", '{"protocol": []}', "[" * 100_000])
def test_numbered_images_without_a_card_are_refused(
    run_folder: Path, deme: Deme, card: str | None
) -> None:
    Path("drawn").mkdir()
    Path("drawn/000000.png").write_bytes(b"")
    if card is not None:
        Path("drawn/samples.json").write_text(card)
    refuse(deme("sample", BASE, "-n", 2, "--steps", 2, "-o", "drawn"), 2, "without samples.json")


def test_a_folder_is_extended_and_never_holds_more_than_n(run_folder: Path, deme: Deme) -> None:
    options = ["--steps", 4, "-b", 2, "-o", "drawn"]
    succeed(deme("sample", BASE, "-n", 3, *options))
    succeed(deme("sample", BASE, "-n", 6, *options))
    succeed(deme("sample", BASE, "-n", 6, "--steps", 4, "-b", 2, "-o", OUTPUT))
    assert np.array_equal(pixels_of(Path("drawn")), images_of(OUTPUT)[..., 0])
    refuse(deme("sample", BASE, "-n", 4, *options), 2, "6 images")
    refuse(deme("sample", BASE, "-n", 9, *options, "--seed", 1), 2, "seed = 0")


def test_a_broken_or_missing_image_in_a_folder_is_drawn_again(run_folder: Path, deme: Deme) -> None:
    command = ["sample", BASE, "-n", 5, "--steps", 4, "-b", 2, "-o", "drawn"]
    succeed(deme(*command))
    pixels = pixels_of(Path("drawn"))
    Path("drawn/000003.png").write_bytes(Path("drawn/000003.png").read_bytes()[:30])
    Path("drawn/000004.png").unlink()
    document = json.loads(succeed(deme(*command, "--json")).stdout)
    assert document["kept"] == 2
    assert np.array_equal(pixels_of(Path("drawn")), pixels)


def leave_unfinished(deme: Deme, num_bytes: int) -> None:
    """What a crash leaves: the card, and images cut anywhere."""
    succeed(deme("sample", BASE, "-n", 7, "--steps", 4, "-b", 2, "-o", OUTPUT))
    line = json.dumps({"protocol": read_record(OUTPUT).protocol}).encode() + b"\n"
    images = images_of(OUTPUT).tobytes()
    OUTPUT.unlink()
    Path("out.png").unlink()
    Path(".out.safetensors.unfinished").write_bytes(line + images[:num_bytes])


def test_an_unfinished_artifact_is_resumed_at_a_whole_batch(run_folder: Path, deme: Deme) -> None:
    succeed(deme("sample", BASE, "-n", 7, "--steps", 4, "-b", 2, "-o", "whole.safetensors"))
    leave_unfinished(deme, 5 * 64 + 17)
    command = ["sample", BASE, "-n", 7, "--steps", 4, "-b", 2, "-o", OUTPUT, "--json"]
    assert json.loads(succeed(deme(*command)).stdout)["kept"] == 4
    assert OUTPUT.read_bytes() == Path("whole.safetensors").read_bytes()
    assert not list(Path(".").glob(".*"))


def test_an_artifact_stopped_before_its_end_was_written_is_finished(
    run_folder: Path, deme: Deme
) -> None:
    leave_unfinished(deme, 7 * 64)
    command = ["sample", BASE, "-n", 7, "--steps", 4, "-b", 2, "-o", OUTPUT, "--json"]
    assert json.loads(succeed(deme(*command)).stdout)["kept"] == 7
    assert images_of(OUTPUT).shape == (7, 8, 8, 1)


@pytest.mark.parametrize("line", ['{"protocol": {"mod', '{"protocol": []}\n'])
def test_a_card_that_is_not_whole_starts_anew(run_folder: Path, deme: Deme, line: str) -> None:
    Path(".out.safetensors.unfinished").write_text(line)
    succeed(deme("sample", BASE, "-n", 2, "--steps", 4, "-o", OUTPUT))


def test_an_unfinished_artifact_of_other_settings_is_not_mixed_in(
    run_folder: Path, deme: Deme
) -> None:
    leave_unfinished(deme, 4 * 64)
    command = ["sample", BASE, "-n", 7, "--steps", 5, "-o", OUTPUT]
    refuse(deme(*command), 2, "steps = 4", "this run has 5")
    succeed(deme(*command, "--force"))
    assert read_record(OUTPUT).protocol["steps"] == 5


def test_two_runs_do_not_write_one_output(run_folder: Path, deme: Deme) -> None:
    with claim(Path(".out.safetensors.unfinished")):
        refuse(deme("sample", BASE, "-n", 2, "--steps", 2, "-o", OUTPUT), 2, "another deme process")
    with claim(Path("drawn/samples.json")):
        refuse(deme("sample", BASE, "-n", 2, "--steps", 2, "-o", "drawn"), 2, "another deme")


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """A SIGHUP that is heard, also where pytest itself runs under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "exit_code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGHUP", 75), ("SIGINT", 130)]
)
@pytest.mark.parametrize("output", ["out.safetensors", "drawn"])
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
    command = ["sample", BASE, "-n", 7, "--steps", 4, "-b", 2]
    document = json.loads(succeed(deme(*command, "-o", output, "--json")).stdout)
    assert document["kept"] == 4
    succeed(deme(*command))
    images = pixels_of(Path(output)) if output == "drawn" else images_of(Path(output))[..., 0]
    assert np.array_equal(images, images_of(Path("base-samples.safetensors"))[..., 0])


@pytest.mark.slow
def test_the_command_itself_ends_with_75_when_terminated(run_folder: Path) -> None:
    options = ["sample", "base.safetensors", "-n", "4000", "-b", "4", "-o", "out.safetensors"]
    process = subprocess.Popen(
        [sys.executable, "-m", "deme_cli", *options], stderr=subprocess.PIPE, text=True
    )
    unfinished = Path(".out.safetensors.unfinished")
    deadline = time.monotonic() + 120
    while not (unfinished.exists() and unfinished.stat().st_size > 1200):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "of 4000 images for out.safetensors are kept, run the same command again" in message
    assert unfinished.exists()
    assert not OUTPUT.exists()


def test_weights_that_are_not_finite_exit_with_5(run_folder: Path, deme: Deme) -> None:
    weights = load_tensors(BASE)
    weights["conv_out.bias"][0] = float("nan")
    write_artifact(Path("nan.safetensors"), weights, read_record(BASE))
    refuse(deme("sample", "nan.safetensors", "-n", 2, "--steps", 2), 5, "not finite")
    assert not Path("nan-samples.safetensors").exists()


def test_experts_with_a_gap_exit_with_4(run_folder: Path, deme: Deme) -> None:
    refuse(deme("ensemble-sample", *experts()[1:], "-n", 2), 4, "no expert covers timesteps 0:25")


@pytest.mark.parametrize(
    ("options", "exit_code", "fault"),
    [
        (["--dtype", "fp8"], 2, "--dtype fp8"),
        (["--device", "warp"], 2, "--device warp"),
        (["--sampler", "magic"], 2, "magic"),
        (["-n", "0"], 2, "num"),
        (["--steps", "101"], 2, "1 to 100"),
        (["--sampler", "ddpm", "--eta", "1"], 2, "eta"),
        (["-o", "base.safetensors"], 2, "exists"),
    ],
)
def test_wrong_options_are_refused_by_name(
    run_folder: Path, deme: Deme, options: list[str], exit_code: int, fault: str
) -> None:
    refuse(deme("sample", BASE, *options), exit_code, fault)


def test_a_model_that_is_not_there_exits_with_3(run_folder: Path, deme: Deme) -> None:
    refuse(deme("sample", "nowhere.safetensors"), 3, "nowhere.safetensors")


def test_a_task_vector_or_samples_file_is_no_model(run_folder: Path, deme: Deme) -> None:
    succeed(deme("sample", BASE, "-n", 1, "--steps", 2, "-o", OUTPUT))
    refuse(deme("sample", OUTPUT, "-n", 1), 4, "found 'samples'")


def test_a_lone_expert_draws_with_a_warning(run_folder: Path, deme: Deme) -> None:
    result = succeed(deme("sample", "ft_2of4.safetensors", "-n", 1, "--steps", 2))
    assert "expert of timesteps 25:50" in result.stderr
    assert read_record(Path("ft_2of4-samples.safetensors")).protocol["ranges"] == [[0, 100]]


def test_a_dry_run_checks_and_writes_nothing(run_folder: Path, deme: Deme) -> None:
    result = succeed(deme("ensemble-sample", *experts(), "-n", 9, "--dry-run"))
    assert result.stdout == ""
    assert "would draw 9 images" in result.stderr
    assert not Path("ensemble.safetensors").exists()
    document = json.loads(deme("sample", BASE, "--dry-run", "--json").stdout)
    assert document["dry_run"] is True
    refuse(deme("sample", BASE, "--steps", 1000, "--dry-run"), 2, "1 to 100")


def test_settings_come_from_deme_toml_unless_given(run_folder: Path, deme: Deme) -> None:
    Path("deme.toml").write_text("[sample]\nnum = 3\nsteps = 4\n")
    succeed(deme("sample", BASE, "--steps", 5, "-o", OUTPUT))
    protocol = read_record(OUTPUT).protocol
    assert (protocol["num"], protocol["steps"]) == (3, 5)
