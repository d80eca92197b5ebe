"""Wan 2.1 as a model of still images: what it shares with flow models, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from tiny_pipelines import BUILDERS, FACTOR
from typer.testing import Result

from deme_cli.artifacts import read_record
from deme_cli.config import SampleConfig
from deme_cli.diffusion.backbones.wan import Wan
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import build_network
from deme_cli.diffusion.export import model_card
from deme_cli.diffusion.model_files import find_folder, locate_model
from deme_cli.diffusion.projection import sites
from deme_cli.diffusion.schedule import FlowSchedule, read_schedule
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.merging.coefficients import groups_of
from deme_cli.sampling.scheduler import build_scheduler
from deme_cli.training.weighting import powers

pytestmark = pytest.mark.skipif("wan" not in BUILDERS, reason="diffusers before 0.33")
PUBLISHED = {  # of Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "solver_order": 2,
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0,
    "beta_schedule": "linear",
}  # fmt: skip
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def test_a_sampler_told_to_follow_a_flow_is_the_flow_of_its_shift() -> None:
    wan, euler = read_schedule(PUBLISHED), read_schedule(EULER)
    assert isinstance(wan, FlowSchedule)
    assert torch.equal(wan.sigmas, euler.sigmas)
    x0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    assert torch.equal(wan.target(x0, eps, t), eps - x0)
    assert all(torch.equal(*pair) for pair in zip(powers(wan), powers(euler), strict=True))
    with pytest.raises(ArtifactError, match="prediction type 'flow_prediction'"):
        read_schedule({**PUBLISHED, "use_flow_sigmas": False})


def test_the_checkpoint_s_own_sampler_keeps_its_settings() -> None:
    own = {**PUBLISHED, "solver_order": 3, "disable_corrector": [0]}
    ours = build_scheduler(own, SampleConfig(sampler="unipc", steps=7))
    theirs = diffusers.UniPCMultistepScheduler.from_config(own)
    theirs.set_timesteps(7)
    assert (ours.config.solver_order, ours.config.disable_corrector) == (3, [0])
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    for sampler in ("euler", "heun", "dpm++"):
        assert len(build_scheduler(own, SampleConfig(sampler=sampler, steps=7)).timesteps) >= 7
    with pytest.raises(ConfigError, match="ddim does not fit"):
        build_scheduler(own, SampleConfig(sampler="ddim"))


def test_each_block_has_coefficients_and_projections_of_its_own(
    pipelines: Callable[..., Path],
) -> None:
    network = open_denoiser(str(pipelines("wan"))).network
    names = list(network.state_dict())
    assert groups_of(names, "block") == ["blocks.0.*", "blocks.1.*"]
    layers = groups_of(names, "layer")
    assert "blocks.1.ffn.net.2.*" in layers
    assert layers.index("blocks.1.ffn.net.2.*") < layers.index("blocks.1.*")  # its table
    ends = ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")
    expected = [(f"blocks.{block}.{end}", 24) for block in range(2) for end in ends]
    assert [(site.path, site.width) for site in sites(network, "fold")] == expected


def test_sizes_are_those_of_patches_and_of_the_published_vae(
    pipelines: Callable[..., Path],
) -> None:
    companions = open_companions(open_denoiser(str(pipelines("wan"))).record)
    assert companions.factor == FACTOR
    for resolution in (18, 260):
        with pytest.raises(ConfigError, match="multiples of 2 up to 128"):
            companions.latent_shape((4, 8, 8), resolution)
    published = {"in_channels": 16, "patch_size": [1, 2, 2], "rope_max_seq_len": 1024}
    channels, height, width = Wan().sample_shape(published)
    assert (channels, 8 * height, 8 * width) == (16, 640, 640)
    assert Wan().size_refusal(published, height) is None
    told = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "latents_mean": [0.0], "latents_std": [1.0]}
    assert 2 ** (len(Wan().vae_config(told)["block_out_channels"]) - 1) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]},
         "one of transformer_2 and boundary_ratio without the other"),
        ({"expand_timesteps": True}, r"expand_timesteps\), Wan 2.2 5B; deme takes Wan 2.1"),
    ],
)  # fmt: skip
def test_wan_2_2_is_refused_before_it_is_fetched_or_read(
    changes: dict[str, Any], message: str, pipelines: Callable[..., Path], tmp_path: Path,
    deme: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "wan22"
    folder.mkdir()
    index = json.loads((pipelines("wan") / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))
    with pytest.raises(ArtifactError, match=message):
        locate_model(str(folder))
    error = deme("split", folder, "-o", tmp_path / "run").exception
    assert isinstance(error, ArtifactError)
    assert "\n" not in str(error)
    record = open_denoiser(str(pipelines("wan"))).record
    with pytest.raises(ArtifactError, match=message):
        open_companions(record, pipeline=str(folder))

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model_index.json")])
    monkeypatch.setattr("deme_cli.diffusion.model_files.offline_reason", lambda: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: info)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: str(folder / "model_index.json")
    )
    with pytest.raises(ArtifactError, match=message):
        find_folder("some/wan22")


def test_a_vae_of_another_kind_is_refused(pipelines: Callable[..., Path]) -> None:
    record = open_denoiser(str(pipelines("wan"))).record
    with pytest.raises(ArtifactError, match=r"'AutoencoderKL' without z_dim.*AutoencoderKLWan"):
        open_companions(replace(record, companions={}), pipeline=str(pipelines("sd")))


def test_a_diffusers_without_wan_is_told_in_one_line(
    pipelines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = open_denoiser(str(pipelines("wan"))).record
    monkeypatch.setattr(Wan, "class_name", "WanTransformer9DModel")
    with pytest.raises(MissingError, match=r"has no WanTransformer9DModel, which came with 0\.33"):
        build_network({**record.model_config, "_class_name": "WanTransformer9DModel"})


def test_the_card_of_an_export_asks_for_one_frame(
    pipelines: Callable[..., Path], deme: Callable[..., Result], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert deme("split", pipelines("wan"), "--data", "digits").exit_code == 0
    assert 'sampler = "unipc"' in Path("deme.toml").read_text()
    card = model_card([read_record(Path("base.safetensors"), "base")], Path("wan"))
    call = next(line for line in card.splitlines() if line.startswith("image = "))
    assert "num_frames=1" in call
    assert "| beta schedule | None |" in card
    exec(call, {"pipeline": lambda *a, **k: type("Output", (), {"frames": [["image"]]})})
