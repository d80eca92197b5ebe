"""A denoiser is its weights, its schedule and its record; anything that disagrees is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL, write_tiny_base
from tiny_pipelines import BUILDERS
from transformers import T5EncoderModel

from deme_cli.artifacts import load_tensors
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import (
    TORCH_DTYPES,
    assemble,
    build_network,
    choose_device,
    load_denoiser,
    predict,
)
from deme_cli.diffusion.projection import attach_projections
from deme_cli.errors import ArtifactError, ConfigError, MissingError


def test_an_artifact_gives_back_the_network_that_was_stored(tmp_path: Path) -> None:
    write_tiny_base(tmp_path / "base.safetensors", seed=3)
    denoiser = load_denoiser(tmp_path / "base.safetensors")
    torch.manual_seed(3)
    network = build_network(TINY_MODEL).eval()
    x_t = torch.randn(2, 1, 8, 8)
    expected = predict(network, x_t, torch.tensor(7))
    assert torch.equal(predict(denoiser.network, x_t, torch.tensor(7)), expected)
    assert denoiser.sample_shape == (1, 8, 8)
    assert denoiser.schedule.num_train_timesteps == 100
    assert not any(parameter.requires_grad for parameter in denoiser.network.parameters())
    assert (denoiser.device.type, denoiser.dtype) == ("cpu", torch.float32)


def test_block_projections_among_the_weights_are_attached(tmp_path: Path) -> None:
    record = write_tiny_base(tmp_path / "base.safetensors")
    network = build_network(TINY_MODEL)
    network.load_state_dict(load_tensors(tmp_path / "base.safetensors"))
    attach_projections(network, "block")
    network.channel_projection["mid_block"].weight.data.mul_(2)
    denoiser = assemble(record, network.state_dict(), "here")
    x_t = torch.randn(1, 1, 8, 8)
    expected = predict(network.eval(), x_t, torch.tensor(5))
    assert torch.equal(predict(denoiser.network, x_t, torch.tensor(5)), expected)


def test_a_missing_a_misshapen_and_an_unknown_parameter_are_named(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    record = write_tiny_base(path)
    weights = load_tensors(path)
    lacking = {name: tensor for name, tensor in weights.items() if name != "conv_in.bias"}
    with pytest.raises(ArtifactError, match=r"lacks the parameter 'conv_in\.bias'"):
        assemble(record, lacking, "here")
    with pytest.raises(ArtifactError, match=r"'conv_in\.bias' has shape \(1,\).*says \(8,\)"):
        assemble(record, {**weights, "conv_in.bias": torch.zeros(1)}, "here")
    with pytest.raises(ArtifactError, match="'surprise' is not in its model config"):
        assemble(record, {**weights, "surprise": torch.zeros(1)}, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "backbone 'UNet3DConditionModel'"),
        ({"sample_size": None}, "lacks sample_size"),
        ({"out_channels": 2}, "learned variances"),
        ({"num_class_embeds": 10}, "class-conditional"),
        ({"block_out_channels": [8]}, "unusable model config"),
        ({"norm_num_groups": 5}, "unusable model config"),
    ],
)
def test_a_model_that_deme_cannot_take_is_refused_with_its_reason(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=f"here: .*{message}"):
        build_network({**TINY_MODEL, **change}, "here")


def test_a_device_that_is_not_there_is_named() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="--device tpu9x"):
        choose_device("tpu9x")
    with pytest.raises(MissingError, match="--device cuda:99"):
        choose_device("cuda:99")


@pytest.mark.parametrize("name", [n for n in ("dit", "wan") if n in BUILDERS])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_in_float32_what_diffusers_keeps(
    pipelines: Callable[..., Path], name: str, dtype: str
) -> None:
    denoiser = open_denoiser(str(pipelines(name)), dtype=dtype)
    own, place = denoiser.network, pipelines(name) / denoiser.backbone.part
    theirs = type(own).from_pretrained(place, torch_dtype=TORCH_DTYPES[dtype])
    assert denoiser.dtype == TORCH_DTYPES[dtype]
    for kind in ("named_parameters", "named_buffers"):
        for (where, a), (_, b) in zip(getattr(own, kind)(), getattr(theirs, kind)(), strict=True):
            assert (a.dtype, True) == (b.dtype, torch.equal(a, b)), where


def test_half_precision_keeps_in_float32_what_transformers_keeps(
    pipelines: Callable[..., Path],
) -> None:
    record = open_denoiser(str(pipelines("sd3"))).record
    own = open_companions(record, dtype="fp16").pipeline.text_encoder_3.state_dict()
    place = pipelines("sd3") / "text_encoder_3"
    theirs = T5EncoderModel.from_pretrained(place, torch_dtype=torch.float16).state_dict()
    assert {name: t.dtype for name, t in own.items()} == {n: t.dtype for n, t in theirs.items()}
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())
