"""Adapters of every kind as peft and diffusers write them: taken as peft merges them, or not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from conftest import write_tiny_base
from safetensors.torch import load_file, save_file
from typer.testing import Result

from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.errors import ArtifactError

Deme = Callable[..., Result]
OPTIONS = ("--base", "base.safetensors", "--range", "1/2", "-o", "ft.safetensors", "--force")
LAYERS = r".*(to_q|to_k|conv1|conv_shortcut|ff\.net\.2|proj_in)"
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": LAYERS}
TO_Q = {"target_modules": ["to_q"]}
PATTERNS = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 1, r"conv\d": 3}}
PIPELINES = {
    "unet": diffusers.StableDiffusionPipeline,
    "transformer": diffusers.StableDiffusion3Pipeline,
}
# What PEFT makes, and the words that refuse it; None where it comes in as PEFT merges it.
KINDS: dict[str, tuple[peft.PeftConfig, str | None]] = {
    "plain": (peft.LoraConfig(**LORA), None),
    "rslora": (peft.LoraConfig(**LORA, use_rslora=True), None),
    "patterns": (peft.LoraConfig(**LORA, **PATTERNS), None),
    "rslora and patterns": (peft.LoraConfig(**LORA, **PATTERNS, use_rslora=True), None),
    "fan in": (peft.LoraConfig(**LORA, fan_in_fan_out=True), None),
    "dora": (peft.LoraConfig(**LORA, use_dora=True), "DoRA; deme takes plain LoRA"),
    "pissa": (peft.LoraConfig(**LORA | TO_Q, init_lora_weights="pissa"), "made with pissa, which"),
    "olora": (peft.LoraConfig(**LORA | TO_Q, init_lora_weights="olora"), "made with olora, which"),
    "bias": (peft.LoraConfig(**LORA, bias="lora_only"), "is a bias"),
    "all biases": (peft.LoraConfig(**LORA, bias="all"), "is a bias"),
    "lora bias": (peft.LoraConfig(**LORA, lora_bias=True), "is a bias"),
    "whole layers": (peft.LoraConfig(**LORA, modules_to_save=["conv_out"]), "out.bias' is a bias"),
    "loha": (peft.LoHaConfig(**TO_Q), "an adapter of type LOHA"),
    "lokr": (peft.LoKrConfig(**TO_Q), "an adapter of type LOKR"),
    "oft": (peft.OFTConfig(**TO_Q), "an adapter of type OFT"),
    "ia3": (peft.IA3Config(**TO_Q, feedforward_modules=[]), "an adapter of type IA3"),
    "vera": (peft.VeraConfig(**TO_Q, r=2), "an adapter of type VERA"),
    "adalora": (peft.AdaLoraConfig(**TO_Q, total_step=9), "an adapter of type ADALORA"),
}


@pytest.fixture
def network(
    request: pytest.FixtureRequest, pipelines: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> torch.nn.Module:  # fmt: skip
    """The network of the base in the current folder."""
    monkeypatch.chdir(tmp_path)
    if request.param == "unet":
        write_tiny_base(Path("base.safetensors"))
    else:
        denoiser = open_denoiser(str(pipelines(request.param)))
        write_artifact(Path("base.safetensors"), denoiser.network.state_dict(), denoiser.record)
    return load_denoiser(Path("base.safetensors")).network


def trained(network: torch.nn.Module, config: peft.PeftConfig) -> peft.PeftModel:
    """Adapters of a network, every number that would be trained another than it was."""
    torch.manual_seed(0)
    model = peft.get_peft_model(network, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def check(deme: Deme, source: str, expected: dict[str, torch.Tensor] | None, words: str) -> str:
    """What comes in is as expected, or refused with these words; returns what was said."""
    result = deme("import", source, *OPTIONS)
    if expected is None:
        assert isinstance(result.exception, ArtifactError), repr(result.exception)
        assert words in str(result.exception)
        return ""
    assert result.exit_code == 0, result.exception
    ours = load_tensors(Path("ft.safetensors"))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("kind", "network"),
    [(kind, "unet") for kind in KINDS]
    + [(kind, "sd3") for kind, (_, words) in KINDS.items() if words is None],
    indirect=["network"],
)
def test_what_peft_saves_comes_in_as_it_merges_it_or_is_refused_by_name(
    kind: str, network: torch.nn.Module, deme: Deme
) -> None:
    config, words = KINDS[kind]
    model = trained(network, copy.deepcopy(config))
    model.save_pretrained("saved")
    part = "unet" if hasattr(network, "conv_in") else "transformer"
    layers = load_file("saved/adapter_model.safetensors")
    told = json.loads(Path("saved/adapter_config.json").read_text())
    PIPELINES[part].save_lora_weights("theirs", **{
        f"{part}_lora_layers": {n.removeprefix("base_model.model."): t for n, t in layers.items()},
        f"{part}_lora_adapter_metadata": told,
    })  # fmt: skip
    expected = None if words else model.merge_and_unload().state_dict()
    for source in ("saved", "saved/adapter_model.safetensors", "theirs"):
        assert "alpha" not in check(deme, source, expected, words or "")


@pytest.mark.parametrize("network", ["sd3"], indirect=True)
def test_a_network_of_diffusers_saves_its_adapters_with_alpha_too(
    network: torch.nn.Module, deme: Deme
) -> None:
    expected = network.state_dict()
    network.add_adapter(
        peft.LoraConfig(**LORA | PATTERNS, use_rslora=True, init_lora_weights=False)
    )
    network.save_lora_adapter("alone")
    for name, module in network.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            expected[f"{name}.weight"] = module.weight + module.get_delta_weight("default")
    assert "alpha" not in check(deme, "alone", expected, "")


@pytest.mark.parametrize("network", ["unet"], indirect=True)
def test_what_was_trained_on_a_changed_base_comes_in_where_peft_converted_it(
    network: torch.nn.Module, deme: Deme
) -> None:
    base = network.state_dict()
    config = peft.LoraConfig(**LORA | TO_Q, init_lora_weights="pissa")
    model = peft.get_peft_model(network, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained("first")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * ("lora_" in name)
    model.save_pretrained("saved", path_initial_model_for_weight_conversion="first")
    expected = model.merge_and_unload().state_dict()
    assert any(not torch.equal(expected[name], base[name]) for name in base)
    check(deme, "saved", expected, "")


@pytest.mark.parametrize("network", ["unet"], indirect=True)
def test_what_nothing_tells_is_told(network: torch.nn.Module, deme: Deme) -> None:
    model = trained(network, peft.LoraConfig(**LORA | {"lora_alpha": 4}))
    model.save_pretrained("saved")
    Path("saved/adapter_config.json").unlink()
    torch.save({"step": 1}, "saved/optimizer.pt")
    expected = model.merge_and_unload().state_dict()
    said = check(deme, "saved", expected, "")
    assert "says alpha of 21 layers: taken as plain LoRA with alpha = rank" in said


@pytest.mark.parametrize("network", ["unet"], indirect=True)
@pytest.mark.parametrize(
    ("name", "words"),
    {
        "lora_unet_conv_in.hada_w1_a": "is LoHa; deme takes pairs",
        "lora_unet_conv_in.lokr_w1": "is LoKr",
        "lora_unet_conv_in.oft_blocks": "is OFT",
        "lora_unet_conv_in.on_input": "is IA3",
        "lora_unet_conv_in.a1.weight": "is no factor",
        "lora_unet_conv_in.w_norm": "is no factor",
        "lora_unet_conv_in.diff": "is a whole difference",
        "lora_unet_conv_in.dora_scale": "is DoRA",
        "conv_in.lora_magnitude_vector": "is DoRA",
        "conv_in.lora_B.bias": "is a bias",
        "base_model.model.conv_in.oft_R.weight": "is OFT",
        "base_model.model.conv_in.ia3_l": "is IA3",
        "base_model.model.conv_in.vera_lambda_b": "is no factor",
    }.items(),
)  # fmt: skip
def test_what_is_no_lora_is_refused_by_the_name_of_a_tensor(
    name: str, words: str, network: torch.nn.Module, deme: Deme
) -> None:
    save_file({name: torch.ones(2, 2)}, "theirs.safetensors")
    check(deme, "theirs.safetensors", None, f"'{name}' {words}")


@pytest.mark.parametrize("network", ["unet"], indirect=True)
def test_a_variant_of_lora_is_refused_by_its_setting(network: torch.nn.Module, deme: Deme) -> None:
    trained(network, peft.LoraConfig(**LORA)).save_pretrained("saved")
    path = Path("saved/adapter_config.json")
    told = json.loads(path.read_text())
    for setting, words in (
        ("kasa_config", "KaSA"), ("use_bdlora", "BD-LoRA"), ("use_qalora", "QALoRA"),
        ("alora_invocation_tokens", "aLoRA"), ("monteclora_config", "MonteCLoRA"),
        ("arrow_config", "Arrow"), ("layer_replication", "on layers that it doubles"),
    ):  # fmt: skip
        path.write_text(json.dumps(told | {setting: [1]}))
        check(deme, "saved", None, f"{words}; deme takes plain LoRA")
