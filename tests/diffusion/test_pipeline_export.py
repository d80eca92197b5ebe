"""A pipeline goes in through `split` and comes out of `export`, around another denoiser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from safetensors.torch import save_file
from tiny_pipelines import BUILDERS
from typer.testing import Result

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import build_network
from deme_cli.diffusion.model_files import digests_of
from deme_cli.errors import ArtifactError, ConfigError, MissingError

Deme = Callable[..., Result]
Pipelines = Callable[..., Path]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def draw(folder: Path, wants: str) -> np.ndarray:
    """Two images by diffusers' own pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    told: dict[str, Any] = {"class_labels": [3, 7], "guidance_scale": 1.0}
    if wants == "text":
        told = {"prompt": ["a seven", "a boat"], "height": 16, "width": 16}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    told |= {"num_inference_steps": 3, "generator": generators, "output_type": "np"}
    if type(pipeline).__name__ == "WanPipeline":
        return pipeline(**told, num_frames=1).frames
    return pipeline(**told).images


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_split_and_export_give_back_the_pipeline(
    name: str, pipelines: Pipelines, deme: Deme
) -> None:
    source = pipelines(name)
    assert deme("split", source, "-n", 2, "--data", "digits").exit_code == 0
    record = read_record(Path("base.safetensors"), "base")
    assert record.companions == digests_of(source)
    result = deme("export", "base.safetensors", "base")
    assert result.exit_code == 0, result.output
    wants = open_companions(record).wants
    np.testing.assert_array_equal(draw(Path("base"), wants), draw(source, wants))
    assert digests_of(Path("base")) == record.companions


def test_a_missing_part_is_named(pipelines: Pipelines, deme: Deme, tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(pipelines("sd"), part)
        shutil.rmtree(Path(part, part))
        error = deme("split", part, "-o", f"run-{part}").exception
        assert isinstance(error, MissingError)
        assert f"the {part} is missing" in str(error)
    alone = tmp_path / "alone"
    shutil.copytree(pipelines("sd") / "unet", alone)
    error = deme("split", alone, "-o", "run").exception
    assert isinstance(error, MissingError)
    assert "UNet2DConditionModel without scheduler_config.json" in str(error)
    assert "--pipeline" in str(error)
    shutil.copytree(pipelines("sd") / "scheduler", alone / "scheduler")
    deme("split", alone, "-o", "run")
    shutil.rmtree(alone / "scheduler")
    record = read_record(Path("run/base.safetensors"), "base")
    with pytest.raises(MissingError, match=r"a denoiser alone; it needs vae, text_encoder"):
        open_companions(record)
    assert open_companions(record, pipeline=str(pipelines("sd"))).wants == "text"
    deme("split", alone, "-o", "whole", "--pipeline", pipelines("sd"))
    whole = read_record(Path("whole/base.safetensors"), "base")
    assert whole.companions
    stated = (pipelines("sd") / "scheduler/scheduler_config.json").read_text()
    assert whole.scheduler_config == json.loads(stated)
    assert "pipeline = " in Path("whole/deme.toml").read_text()


def test_a_part_that_was_exchanged_is_named(pipelines: Pipelines, deme: Deme) -> None:
    shutil.copytree(pipelines("sd"), "pipe")
    deme("split", "pipe")
    record = read_record(Path("base.safetensors"), "base")
    shutil.copyfile(pipelines("sdxl") / "vae/config.json", "pipe/vae/config.json")
    Path("pipe/vae/config.json").write_text(
        Path("pipe/vae/config.json").read_text().replace("0.5", "0.6")
    )
    with pytest.raises(ArtifactError, match=r"not the vae that the base was imported with"):
        open_companions(record).encode_images(torch.zeros(1, 3, 16, 16))
    assert isinstance(deme("export", "base.safetensors", "out").exception, ArtifactError)
    assert not Path("out").exists()
    shutil.rmtree("pipe")
    with pytest.raises(MissingError, match=r"no such folder; this model needs vae, text_encoder"):
        open_companions(record)


def test_a_resolution_that_latents_cannot_have_is_refused(pipelines: Pipelines) -> None:
    companions = open_companions(open_denoiser(str(pipelines("sd"))).record)
    with pytest.raises(ConfigError, match="multiples of 2 pixels"):
        companions.latent_shape((4, 8, 8), 19)
    for name, side, message in (
        ("sd3", 18, "multiples of 2 up to 32"),
        ("dit", 32, "takes 8 alone"),
    ):
        companions = open_companions(open_denoiser(str(pipelines(name))).record)
        with pytest.raises(ConfigError, match=message):
            companions.latent_shape((4, 8, 8), side)


def test_a_safety_checker_that_was_not_fetched_is_left_out_of_the_export(
    pipelines: Pipelines, deme: Deme
) -> None:
    shutil.copytree(pipelines("sd"), "pipe")
    index = json.loads(Path("pipe/model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    Path("pipe/model_index.json").write_text(json.dumps(index))
    deme("split", "pipe")
    assert deme("export", "base.safetensors", "out").exit_code == 0
    assert diffusers.DiffusionPipeline.from_pretrained("out").safety_checker is None


def test_parts_of_another_model_are_refused_by_what_does_not_fit(pipelines: Pipelines) -> None:
    record = open_denoiser(str(pipelines("sd"))).record
    wide = {**record.model_config, "cross_attention_dim": 24}
    parts = {"model_config": wide, "companions": {}}
    with pytest.raises(ArtifactError, match="of width 16, this network takes 24"):
        open_companions(replace(record, **parts)).conditions(["a boat"])
    deep = {**record.model_config, "in_channels": 16, "out_channels": 16}
    with pytest.raises(ArtifactError, match="4 latent channels, this network denoises 16"):
        open_companions(replace(record, model_config=deep))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_tensor_that_a_part_lacks_is_named_and_never_made_up(
    pipelines: Pipelines, part: str
) -> None:
    shutil.copytree(pipelines("sd"), "pipe")
    (file,) = Path("pipe", part).glob("*.safetensors")
    tensors = load_tensors(file)
    lost = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != lost}, file, {"format": "pt"})
    record = open_denoiser("pipe").record
    with pytest.raises(ArtifactError, match=f"{part}: lacks the tensor {lost!r}"):
        open_companions(record).pipeline  # noqa: B018


@pytest.mark.parametrize(
    "written", [{"variant": "fp16"}, {"safe_serialization": False, "max_shard_size": "50KB"}]
)
def test_a_pipeline_of_a_variant_or_of_pickled_shards_comes_out_plain(
    pipelines: Pipelines, deme: Deme, written: dict[str, Any]
) -> None:
    whole = diffusers.DiffusionPipeline.from_pretrained(pipelines("sd"))
    whole.save_pretrained("source", **written)
    assert deme("split", "source", "-n", 2, "--data", "digits").exit_code == 0
    result = deme("export", "base.safetensors", "plain")
    assert result.exit_code == 0, result.exception
    np.testing.assert_array_equal(draw(Path("plain"), "text"), draw(pipelines("sd"), "text"))


def test_a_scheduler_file_is_exported_as_it_came_and_old_records_find_it_again(
    pipelines: Pipelines, deme: Deme
) -> None:
    shutil.copytree(pipelines("sd"), "pipe")
    stated = '{"_class_name": "PNDMScheduler",\n  "beta_end": 0.012, "skip_prk_steps": true}\n'
    Path("pipe/scheduler/scheduler_config.json").write_text(stated)
    assert deme("split", "pipe").exit_code == 0
    record = read_record(Path("base.safetensors"), "base")
    assert record.scheduler_config == json.loads(stated)
    assert 'sampler = "pndm"' in Path("deme.toml").read_text()
    completed = diffusers.PNDMScheduler.from_config(record.scheduler_config).config
    old = {k: v for k, v in completed.items() if not k.startswith("_") or k == "_class_name"}
    write_artifact(
        Path("old.safetensors"),
        load_tensors(Path("base.safetensors")),
        replace(record, scheduler_config=old),
    )
    for name in ("base", "old"):
        assert deme("export", f"{name}.safetensors", name).exit_code == 0
        assert Path(name, "scheduler/scheduler_config.json").read_text() == stated


@pytest.mark.parametrize(("version", "size", "found"), [("0.6.0", 8, 64), ("0.10.2", 8, 8)])
def test_the_size_of_a_unet_of_2022_is_corrected_as_by_its_pipeline(
    pipelines: Pipelines, tmp_path: Path, version: str, size: int, found: int
) -> None:
    folder = Path(shutil.copytree(pipelines("sd"), tmp_path / "pipe"))
    config = json.loads((folder / "unet/config.json").read_text())
    config |= {"_diffusers_version": version, "sample_size": size}
    (folder / "unet/config.json").write_text(json.dumps(config))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline.unet.config.sample_size == found
    assert open_denoiser(str(folder)).sample_shape == (4, found, found)


def test_a_checkpoint_of_a_training_script_has_the_scheduler_of_its_pipeline_or_run(
    pipelines: Pipelines, deme: Deme
) -> None:
    for part in ("unet", "unet_ema"):
        shutil.copytree(pipelines("sd") / "unet", Path("out/checkpoint-5", part))
    pipeline = pipelines("sd", prediction_type="v_prediction")
    result = deme("split", "out/checkpoint-5", "--pipeline", pipeline, "-o", "a")
    assert result.exit_code == 0
    assert "name out/checkpoint-5/unet_ema" in result.stderr.replace("\n", " ")
    assert "predicts v_prediction" in result.stderr
    assert open_denoiser("out/checkpoint-5", pipeline=str(pipeline)).record.scheduler_config
    shutil.copytree(pipeline / "scheduler", "out/scheduler")
    result = deme("split", "out/checkpoint-5/unet_ema", "-o", "b")
    assert "predicts v_prediction" in result.stderr


def test_what_was_guessed_is_told_by_every_command(deme: Deme) -> None:
    build_network(TINY_MODEL).save_pretrained("bare")
    for words in (
        ["split", "bare"],
        ["sample", "bare", "-n", 1, "--steps", 1],
        ["export", "base.safetensors", "out"],
    ):
        assert "took diffusers' DDPM defaults" in deme(*words).stderr
    assert diffusers.DDPMPipeline.from_pretrained("out").scheduler.config.beta_end == 0.02
