"""`deme split` imports any base, divides [0, T), and writes a run file that every command reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER, write_tiny_base
from diffusers import DDPMPipeline, DDPMScheduler
from typer.testing import Result

from deme_cli.artifacts import MergedRecord, fingerprint_file, read_record, write_artifact
from deme_cli.config import TABLES, DataConfig, SplitConfig
from deme_cli.data.digits import DIGITS_SETTINGS
from deme_cli.diffusion import model_files
from deme_cli.diffusion.denoiser import build_network
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.run_file import read_run_file, render_run_file
from deme_cli.training.clusters import split_times

Deme = Callable[..., Result]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base artifact outside the current folder, which is empty."""
    write_tiny_base(tmp_path / "tiny.safetensors")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "tiny.safetensors"


def test_split_writes_the_base_and_the_run_file(deme: Deme, source: Path) -> None:
    result = deme("split", source, "-n", 4, "--data", "digits")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == ["base.safetensors", "deme.toml"]
    run = read_run_file(None)
    ranges = [str(span) for span in run.settings(SplitConfig).timestep_ranges]
    assert ranges == ["0:25", "25:50", "50:75", "75:100"]
    assert run.settings(DataConfig).source == "digits"
    assert run.base == Path("base.safetensors")
    assert read_record(Path("base.safetensors"), "base").source == "tiny"
    assert fingerprint_file(Path("base.safetensors")) == fingerprint_file(source)
    assert "predicts epsilon, images 1 x 8 x 8" in result.stderr


def test_a_dry_run_tells_all_and_writes_nothing(deme: Deme, source: Path) -> None:
    arguments = ("split", source, "-n", 3, "--json", "--data", "digits")
    dry = json.loads(deme(*arguments, "--dry-run").stdout)
    assert list(Path().iterdir()) == []
    document = json.loads(deme(*arguments).stdout)
    assert document["ranges"] == ["0:34", "34:67", "67:100"]  # they need not divide T
    assert (document["schema_version"], document["parameters"]) == (1, 44_969)
    assert document["fingerprint"] == fingerprint_file(Path("base.safetensors"))
    assert dry == {**document, "paths": [], "dry_run": True}


def test_a_diffusers_folder_becomes_a_base(deme: Deme, source: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipeline = DDPMPipeline(build_network(TINY_MODEL), DDPMScheduler.from_config(TINY_SCHEDULER))
    pipeline.save_pretrained(tmp_path / "my-cifar10-ddpm")
    build_network(TINY_MODEL).save_pretrained(tmp_path / "bare")
    said = deme("split", tmp_path / "bare", "-o", "other").stderr
    assert "took diffusers' DDPM defaults" in said
    assert "set source under [data]" in said
    result = deme("split", tmp_path / "my-cifar10-ddpm", "-n", 2)
    assert result.exit_code == 0
    assert read_run_file(None).settings(DataConfig).source == "cifar10"
    assert "the training images are not there yet" in result.stderr
    expected = fingerprint_file(
        tmp_path / "my-cifar10-ddpm/unet/diffusion_pytorch_model.safetensors"
    )
    assert fingerprint_file(Path("base.safetensors")) == expected


def test_the_embedded_digits_are_the_default(
    deme: Deme, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "BASE_PATH", source)
    assert deme("split", "-q").exit_code == 0
    run = read_run_file(None)
    assert read_record(Path("base.safetensors"), "base").source == "digits"
    assert run.settings(DataConfig).source == "digits"
    for table, values in DIGITS_SETTINGS.items():
        assert values.items() <= run.tables.get(table, {}).items()


def test_a_merged_model_starts_another_round(deme: Deme, source: Path, tmp_path: Path) -> None:
    base = read_record(source, "base")
    record = MergedRecord(
        source="tiny", model_config=base.model_config, scheduler_config=base.scheduler_config,
        num_train_timesteps=100, base=base.fingerprint, parents=[], coefficients=[],
        method="linear", projection="none",
    )  # fmt: skip
    weights = build_network(TINY_MODEL).state_dict()
    merged = write_artifact(tmp_path / "merged.safetensors", weights, record)
    assert deme("split", tmp_path / "merged.safetensors", "--data", "digits").exit_code == 0
    again = read_record(Path("base.safetensors"), "base")
    assert again.fingerprint == merged.fingerprint
    assert again.source == str(tmp_path / "merged.safetensors")


def test_an_existing_run_is_kept_unless_forced_and_its_base_is_split_in_place(
    deme: Deme, refuse: Callable, source: Path
) -> None:
    deme("split", source, "-n", 2, "--data", "digits")
    words = ("split", source, "-n", 4, "--data", "digits")
    refuse(2, "base.safetensors exists; add --force", *words)
    assert deme(*words, "--force").exit_code == 0
    assert read_run_file(None).settings(SplitConfig).n == 4
    Path("deme.toml").unlink()
    before = Path("base.safetensors").stat().st_mtime_ns
    assert deme("split", "base.safetensors", "-n", 3, "--data", "digits").exit_code == 0
    assert Path("base.safetensors").stat().st_mtime_ns == before
    assert read_run_file(None).settings(SplitConfig).n == 3


def test_a_run_goes_to_the_folder_that_is_named(
    deme: Deme, source: Path, image_folder: Path
) -> None:
    Path("photos").symlink_to(image_folder)
    result = deme("split", source, "-o", "runs/a", "--data", "photos")
    assert result.stdout.splitlines() == ["runs/a/base.safetensors", "runs/a/deme.toml"]
    written = read_run_file(Path("runs/a/deme.toml")).settings(DataConfig).source
    assert Path(written).is_absolute()
    assert Path(written).samefile(image_folder)


def test_ranges_may_follow_the_signal_to_noise_ratio(deme: Deme, source: Path) -> None:
    result = deme("split", source, "-n", 4, "--by", "log-snr", "--data", "digits", "--json")
    ranges, schedule = json.loads(result.stdout)["ranges"], read_schedule(TINY_SCHEDULER)
    assert ranges == [str(span) for span in split_times(4, "log-snr", schedule)]
    settings = read_run_file(None).settings(SplitConfig)
    assert (settings.n, settings.by, settings.ranges) == (4, "log-snr", ranges)
    assert "SNR from (dB)" in result.stderr


def test_what_cannot_be_split_is_told(refuse: Callable, source: Path) -> None:
    Path("../x.safetensors").write_bytes(b"broken")
    for arguments, exit_code, message in [
        ([source, "--by", "magic"], 2, "'magic': expected one of uniform"),
        ([source, "--gradients", "g.json"], 2, "is read by --by gradient alone"),
        ([source, "--by", "gradient"], 3, "no gradients were measured; do so with"),
        (["--data", "photos"], 2, "without MODEL"),
        (["--pipeline", "sd"], 2, "without MODEL"),
        (["nowhere"], 3, "nowhere: no such file or folder"),
        (["../x.safetensors"], 4, "not a whole safetensors file"),
    ]:
        refuse(exit_code, message, "split", *arguments)


def test_every_setting_is_in_the_run_file_and_can_be_switched_on(tmp_path: Path) -> None:
    text = render_run_file({})
    for table, config in TABLES.items():
        section = text.split(f"[{table}]\n")[1]
        assert all(f"# {item.metadata['help']}" in section for item in fields(config)), table
    text = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    path = tmp_path / "deme.toml"
    text = text.replace('ranges = ""', 'ranges = ["0:50", "50:100"]')
    path.write_text(text.replace('loss_weighting = "none"', 'loss_weighting = "p2"'))
    run = read_run_file(path)
    for table, config in TABLES.items():
        assert run.tables[table].keys() == {item.name for item in fields(config)}
        run.settings(config)
