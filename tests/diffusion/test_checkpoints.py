"""Models come in from diffusers folders of any age, from the hub's cache, and from artifacts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER, write_tiny_base
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from deme_cli.artifacts import fingerprint, load_tensors, read_record, write_artifact
from deme_cli.diffusion import model_files
from deme_cli.diffusion.checkpoints import import_model
from deme_cli.diffusion.denoiser import build_network
from deme_cli.diffusion.model_files import locate_model, peek_timesteps, wanted_files
from deme_cli.diffusion.projection import attach_projections
from deme_cli.errors import ArtifactError, DemeError, MissingError, NumericsError

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDPM pipeline as diffusers saves it, `pipe`, and with pickled weights, `pickled`."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    network = build_network(TINY_MODEL)
    pipeline = DDPMPipeline(network, DDPMScheduler.from_config(TINY_SCHEDULER))
    pipeline.save_pretrained(folder / "pipe")
    pipeline.save_pretrained(folder / "pickled", safe_serialization=False)
    return folder


@pytest.fixture
def pipe(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "pipe", tmp_path / "pipe"))


@pytest.fixture
def pickled(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "pickled", tmp_path / "pickled"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_pipeline_folder_gives_its_weights_and_configs(pipe: Path) -> None:
    model = import_model(str(pipe))
    assert fingerprint(model.weights) == fingerprint(load_file(pipe / "unet" / WEIGHTS))
    assert model.record.num_train_timesteps == 100
    assert model.record.model_config["block_out_channels"] == [8, 16]
    assert model.record.scheduler_config["beta_end"] == 0.2
    assert model.notes == ()
    assert str(pipe) not in json.dumps([model.record.model_config, model.record.scheduler_config])
    assert import_model(str(pipe / "unet")).record.num_train_timesteps == 100  # beside it


@pytest.mark.parametrize(
    "written",
    [
        {"safe_serialization": False, "max_shard_size": "50KB"},
        {"variant": "fp16", "max_shard_size": "50KB"},
    ],
    ids=str,
)
def test_weights_are_read_however_diffusers_writes_them(pipe: Path, written: dict) -> None:
    network = UNet2DModel.from_pretrained(pipe / "unet")
    (pipe / "unet" / WEIGHTS).unlink()
    network.save_pretrained(pipe / "unet", **written)
    model = import_model(str(pipe))
    assert fingerprint(model.weights) == fingerprint(network.state_dict())
    assert any("read diffusion_pytorch_model.fp16" in n for n in model.notes) == (
        "variant" in written
    )
    assert list((pipe / "unet").glob("*-00002-of-*")) or "max_shard_size" not in written


def test_a_second_set_of_weights_must_hold_the_same(pipe: Path) -> None:
    network = UNet2DModel.from_pretrained(pipe / "unet")
    network.save_pretrained(pipe / "unet", max_shard_size="50KB")
    model = import_model(str(pipe))
    assert fingerprint(model.weights) == fingerprint(load_file(pipe / "unet" / WEIGHTS))
    assert f"read {WEIGHTS}; " in model.notes[0]
    network.conv_in.bias.data += 1
    network.save_pretrained(pipe / "unet", max_shard_size="50KB")
    with pytest.raises(ArtifactError, match=r"hold different weights \('conv_in\.bias'\)"):
        import_model(str(pipe))


def test_of_several_variants_one_is_chosen(pipe: Path) -> None:
    network = UNet2DModel.from_pretrained(pipe / "unet")
    network.conv_in.bias.data += 1
    network.save_pretrained(pipe / "unet", variant="ema")
    plain = import_model(str(pipe))
    assert "variants beside it: ema" in plain.notes[0]
    chosen = fingerprint(import_model(str(pipe), variant="ema").weights)
    assert chosen == fingerprint(network.state_dict()) != fingerprint(plain.weights)
    with pytest.raises(MissingError, match="no weights of the variant 'fp16'"):
        import_model(str(pipe), variant="fp16")
    (pipe / "unet" / WEIGHTS).rename(pipe / "unet" / WEIGHTS.replace(".", ".fp16."))
    with pytest.raises(ArtifactError, match=r"several variants \(ema, fp16\)"):
        import_model(str(pipe))


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "folder", "pickle"])
def test_a_file_of_another_tool_is_told_for_what_it_is(tmp_path: Path, kind: str) -> None:
    weights = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}
    path = tmp_path / "other.ckpt"
    if kind in ("safetensors", "folder"):
        path = tmp_path / "other.safetensors"
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=kind == "ckpt")
    with pytest.raises(ArtifactError, match=r"`deme split FILE` starts from one"):
        import_model(str(tmp_path if kind == "folder" else path))


def change_weights(path: Path, **changes: torch.Tensor | None) -> None:
    """Other tensors by name, in which `__` stands for a dot; None for none."""
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    weights = {**load_file(path), **named}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


def damage(path: Path, content: bytes | None) -> None:
    """These bytes in place of a file, or half of its own."""
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)


def lose_of_shards(pipe: Path, lost: str) -> None:
    network = UNet2DModel.from_pretrained(pipe / "unet")
    (pipe / "unet" / WEIGHTS).unlink()
    network.save_pretrained(pipe / "unet", max_shard_size="50KB")
    next((pipe / "unet").glob(lost)).unlink()


def of_channels(pipe: Path, channels: int) -> None:
    config = {**TINY_MODEL, "in_channels": channels, "out_channels": channels}
    UNet2DModel.from_config(config).save_pretrained(pipe / "unet")


def scheduler(name: str) -> tuple:
    change = lambda f: change_json(f / "model_index.json", scheduler=["diffusers", name])  # noqa: E731
    return change, ArtifactError, f"scheduler '{name}' has neither discrete betas nor a flow"


SPOILT: list[tuple[Callable[[Path], None], type[DemeError], str]] = [
    (lambda f: lose_of_shards(f, "*-00002-of-*"), MissingError, "shards of .* are there"),
    (lambda f: lose_of_shards(f, "*.index.json"), MissingError, r"index\.json is missing"),
    (lambda f: change_weights(f / "unet" / WEIGHTS, conv_out__bias=torch.full([1], torch.inf)),
     NumericsError, r"'conv_out\.bias' holds numbers .* not finite"),
    (lambda f: change_weights(f / "unet" / WEIGHTS, conv_in__weight=None), ArtifactError,
     r"lack 'conv_in\.weight'"),
    (lambda f: change_weights(f / "unet" / WEIGHTS, surprise=torch.zeros(1)), ArtifactError,
     "unknown parameter 'surprise'"),
    (lambda f: change_weights(f / "unet" / WEIGHTS, conv_in__weight=torch.zeros(1)),
     ArtifactError, r"another network: size mismatch for conv_in\.weight"),
    (lambda f: damage(f / "unet" / WEIGHTS, None), ArtifactError, "safetensors"),
    (lambda f: of_channels(f, 4), ArtifactError, "4 channels: .* grey .* or colour"),
    (lambda f: damage(f / "unet/config.json", b"{"), ArtifactError, "not JSON"),
    (lambda f: shutil.rmtree(f / "unet"), MissingError, "not a diffusers model"),
    (lambda f: change_json(f / "model_index.json", vqvae=["diffusers", "VQModel"]),
     ArtifactError, "a pipeline with 'vqvae'"),
    (lambda f: change_json(f / "model_index.json", requires_aesthetics_score=True),
     ArtifactError, "the SDXL refiner"),
    (lambda f: change_json(f / "scheduler/scheduler_config.json", beta_schedule="cubic"),
     ArtifactError, "unusable scheduler config: cubic"),
    scheduler("EDMEulerScheduler"), scheduler("logging"),
]  # fmt: skip


def test_a_folder_that_is_not_whole_or_of_another_kind_is_named(
    saved: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for index, (change, error, match) in enumerate(SPOILT):
        folder = Path(shutil.copytree(saved / "pipe", tmp_path / str(index)))
        change(folder)
        with subtests.test(match), pytest.raises(error, match=match):
            import_model(str(folder))


def test_a_name_that_is_no_model_is_told(run_folder: Path, subtests: pytest.Subtests) -> None:
    for name, error, match in (
        ("nothing", MissingError, "a model is an artifact, a diffusers folder"),
        ("a/lost.safetensors", MissingError, "a model is an artifact, a diffusers folder"),
        ("somebody/some-ddpm", MissingError, "not in the hub's cache, and HF_HUB_OFFLINE is set"),
        ("ft_1of4.safetensors", ArtifactError, "expected an artifact of kind 'base' or 'merged'"),
    ):
        with subtests.test(name), pytest.raises(error, match=match):
            import_model(name)


def test_everything_at_the_root_is_a_pipeline_too(pickled: Path) -> None:
    folder = pickled
    expected = fingerprint(import_model(str(folder)).weights)
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            shutil.move(path, folder / path.name)
        (folder / part).rmdir()
    model = import_model(str(folder))
    assert fingerprint(model.weights) == expected
    assert model.record.num_train_timesteps == 100


def test_attention_names_of_old_checkpoints_become_the_current_ones(pipe: Path) -> None:
    weights = load_file(pipe / "unet" / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_name(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        return name

    renamed = {old_name(name): tensor for name, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, pipe / "unet" / WEIGHTS)
    assert fingerprint(import_model(str(pipe)).weights) == fingerprint(weights)


class Malicious:
    """A pickle that, if it were run, would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_code_in_pickled_weights_is_never_run(
    pickled: Path, tmp_path: Path, plain_pickle: bool
) -> None:
    trap = tmp_path / "trap"
    path = pickled / "unet" / PICKLE
    document = {**torch.load(path, weights_only=True), "surprise": Malicious(trap)}
    if plain_pickle:
        path.write_bytes(pickle.dumps(document, protocol=2))
    else:
        torch.save(document, path)
    with pytest.raises(ArtifactError, match="nothing in it was run"):
        import_model(str(pickled))
    assert not trap.exists()


def test_block_projections_make_no_base(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    record = write_tiny_base(path)
    network = build_network(TINY_MODEL)
    network.load_state_dict(load_tensors(path))
    attach_projections(network, "block")
    write_artifact(path, network.state_dict(), record)
    with pytest.raises(ArtifactError, match="block projections"):
        import_model(str(path))


def test_timesteps_are_told_without_torch(pipe: Path, run_folder: Path) -> None:
    assert peek_timesteps(locate_model(str(pipe))) == 100
    assert peek_timesteps(locate_model("base.safetensors")) == 100
    assert read_record(run_folder / "base.safetensors").num_train_timesteps == 100


def test_a_hub_repository_without_a_diffusers_model_says_what_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = [SimpleNamespace(rfilename=name) for name in ("README.md", "some_lora.safetensors")]
    info = SimpleNamespace(siblings=held)
    monkeypatch.setattr(model_files, "offline_reason", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: info)
    with pytest.raises(MissingError, match=r"no diffusers model .* but some_lora\.safetensors"):
        import_model("somebody/some-lora")


def test_a_hub_model_in_the_cache_needs_no_network(
    pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--somebody--some-ddpm"
    commit = "0" * 40
    shutil.copytree(pipe, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    imported = import_model("somebody/some-ddpm")
    assert imported.record.source == "somebody/some-ddpm"
    assert fingerprint(imported.weights) == fingerprint(import_model(str(pipe)).weights)


def test_only_configs_and_one_set_of_weights_are_fetched() -> None:
    configs = ["model_index.json", "config.json", "scheduler_config.json"]
    assert wanted_files(["README.md", PICKLE, WEIGHTS, *configs]) == [*configs, WEIGHTS]
    nested = ["unet/config.json", f"unet/{PICKLE}", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert wanted_files(nested) == ["unet/config.json", f"unet/{PICKLE}"]
    whole = [
        "model_index.json", "v1-4.ckpt", "safety_checker/model.safetensors",
        "text_encoder/config.json", "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt", "tokenizer_3/spiece.model", "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_flax_model.msgpack", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    left_out = ("v1-4", "safety", "fp16", ".bin", "msgpack")
    kept = [name for name in whole if not any(part in name for part in left_out)]
    assert wanted_files(whole) == kept
