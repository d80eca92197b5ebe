"""Experts of low rank: trained as a hand-written peft loop does, kept, loaded anywhere, shared."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from conftest import collect_images, largest_difference, write_adapter_expert, write_tiny_base
from stand_ins import save_script
from typer.testing import Result

from deme_cli.artifacts import fingerprint, load_tensors, read_record, write_artifact
from deme_cli.config import DataConfig, FinetuneConfig, SampleConfig
from deme_cli.diffusion.adapters import (
    open_adapted,
    target_layers,
)
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser, predict
from deme_cli.diffusion.export import export
from deme_cli.distributed import ALONE
from deme_cli.errors import ConfigError, DemeError, MissingError
from deme_cli.run_file import RunFile
from deme_cli.sampling.ensemble import SamplingExpert, open_ensemble
from deme_cli.sampling.sample import ensemble_sample, sample
from deme_cli.timesteps import parse_range
from deme_cli.training.batches import open_batches
from deme_cli.training.setup import Plan, Run, prepare
from deme_cli.training.state import open_networks, open_state
from deme_cli.training.train import Gradients, train

LORA = FinetuneConfig(
    steps=4, batch_size=6, lr=1e-2, checkpoint_every=2, held_out=8, projection="none",
    consistency=0.5, lora=3, lora_alpha=6.0, lora_targets="all",
)  # fmt: skip
SCALE = 2.0


@pytest.fixture
def run(digits_run: Callable[..., Run]) -> Run:
    return digits_run(LORA)


def by_hand(run: Run) -> torch.nn.Module:
    """The base with peft's own adapters, drawn from the seed, and everything else frozen."""
    network = load_denoiser(run.output.parent / "base.safetensors").network
    names = {name for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    names |= {name for name, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)}
    torch.manual_seed(run.config.seed)
    return peft.get_peft_model(
        network, peft.LoraConfig(r=3, lora_alpha=6, target_modules=sorted(names))
    )


def test_losses_gradients_and_updates_are_those_of_a_peft_loop(run: Run) -> None:
    write_tiny_base(run.output.parent / "base.safetensors")
    model = by_hand(run)
    network, schedule = model.base_model.model, run.denoiser.schedule
    theirs = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6)
    state = open_state(run, ALONE)
    assert len(theirs) == len(state.parameters) > 20
    with open_batches(run, ALONE, state.device) as draw:
        gradients = Gradients(run, state, draw)
        for step in range(3):
            batch = draw(step, 0)
            x_t, t = schedule.add_noise(batch.x0, batch.eps, batch.t), schedule.times(batch.t)
            output = predict(network, x_t, t)
            with torch.no_grad(), model.disable_adapter():
                frozen = predict(network, x_t, t)
            loss = (output - batch.eps).square().mean() + 0.5 * (output - frozen).square().mean()
            loss.backward()
            ((ours, _, _),) = gradients.of_update()
            torch.testing.assert_close(ours, loss.detach(), rtol=0, atol=1e-6)
            for a, b in zip(state.parameters.values(), theirs, strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            adam.step()
            adam.zero_grad()
            state.update()
    for a, b in zip(state.parameters.values(), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # Adam divides by the gradients' size


def test_the_base_costs_no_second_network_and_says_what_it_said(run: Run) -> None:
    before = fingerprint(run.denoiser.network.state_dict())
    network, base = open_networks(run)
    assert base is run.denoiser.network
    own = dict(base.named_parameters())
    for name, parameter in network.named_parameters():
        if ".lora_" not in name:
            assert parameter is own[name.replace(".base_layer", "")]
            assert not parameter.requires_grad
    list(train(run))
    assert fingerprint(run.denoiser.network.state_dict()) == before
    half = replace(run, dtype="bf16")
    network, base = open_networks(half)
    kinds = {name: p.dtype for name, p in network.named_parameters()}
    assert kinds["conv_in.base_layer.weight"] == base.conv_in.weight.dtype == torch.bfloat16
    assert {kind for name, kind in kinds.items() if ".lora_" in name} == {torch.float32}
    list(train(half))


def test_a_base_in_half_precision_reaches_the_device_so(digits_base: Path, tmp_path: Path) -> None:
    config, images = replace(LORA, held_out=0), DataConfig(source="digits")
    plan = Plan(digits_base, images, config, tmp_path / "x.safetensors", parse_range("1/2", 100))
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        network = prepare(replace(plan, dtype=dtype)).denoiser.network
        assert network.conv_in.weight.dtype == kind
        assert network.conv_norm_out.weight.dtype == torch.float32


def test_a_resumed_run_ends_in_the_same_file_bit_for_bit(run: Run) -> None:
    run = replace(run, config=replace(LORA, ema_lengths=[0.1], gradient_checkpointing=False))
    list(train(run))
    record = read_record(run.output, "expert")
    run.output.unlink()
    for step in train(run):
        if step.step == 2:
            break
    list(train(run))
    assert read_record(run.output, "expert") == record
    assert (record.holds, record.projection) == ("adapter", "none")
    assert record.adapter == {"rank": 3, "alpha": 6.0, "targets": "all"}
    sizes = {len(t) for name, t in load_tensors(run.output).items() if ".lora_A." in name}
    assert sizes == {3}


def test_what_is_written_is_base_plus_alpha_by_r_times_the_product(
    run: Run, digits_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits_base.parent)  # where it is looked for
    run = replace(run, config=replace(LORA, ema_decay=0.0))
    state = open_state(run, ALONE)
    list(train(run))
    fused = load_denoiser(run.output).network
    model = open_networks(run)[0]
    held = load_tensors(run.output)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                layer, side = name.removesuffix(".default.weight").rsplit(".lora_", 1)
                value = held[f"unet.{layer}.lora_{side}.weight"]
                parameter.copy_(value / SCALE if side == "B" else value)
        x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 80])
        torch.testing.assert_close(predict(fused, x_t, t), predict(model, x_t, t))
    assert state.parameters.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_plain_diffusers_loads_an_expert_as_a_lora(
    name: str, pipelines: Callable[..., Path], base: Callable[..., Denoiser], tmp_path: Path
) -> None:
    denoiser = base(name)
    write_artifact(tmp_path / "base.safetensors", denoiser.network.state_dict(), denoiser.record)
    write_adapter_expert(tmp_path / "ft.safetensors", tmp_path / "base.safetensors", index=1, of=1)
    ours = load_denoiser(tmp_path / "ft.safetensors").network.state_dict()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines(name))
    pipeline.load_lora_weights(tmp_path / "ft.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    theirs = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    torch.testing.assert_close(ours, theirs.state_dict(), rtol=0, atol=1e-6)


def test_an_ensemble_has_one_base_in_memory_and_draws_what_fused_experts_draw(
    tmp_path: Path,
) -> None:
    write_tiny_base(tmp_path / "base.safetensors")
    paths = [tmp_path / f"ft_{index}of2.safetensors" for index in (1, 2)]
    for index, path in enumerate(paths, 1):
        write_adapter_expert(path, tmp_path / "base.safetensors", index=index, of=2)
    config = SampleConfig(num=4, batch_size=2, steps=6)
    shared = open_ensemble(paths)
    ranges = [expert.range for expert in shared]
    fused = [SamplingExpert(r, lambda p=p: load_denoiser(p))
             for r, p in zip(ranges, paths, strict=True)]  # fmt: skip
    first, second = (collect_images(experts, config) for experts in (shared, fused))
    assert largest_difference(first, second) <= 1
    base = load_denoiser(tmp_path / "base.safetensors")
    assert largest_difference(first, collect_images(
        [SamplingExpert(r, lambda: base) for r in ranges], config)) > 1  # fmt: skip
    networks = [expert.load().network for expert in shared]
    weights = [n.conv_in.weight.data_ptr() for n in networks]
    assert weights[0] == weights[1]
    adapters = [dict(n.named_parameters()) for n in networks]
    assert all(
        not torch.equal(a, adapters[1][name]) for name, a in adapters[0].items() if ".lora_" in name
    )
    opened = open_adapted(load_denoiser)(paths[0])
    assert opened.record == read_record(paths[0], "expert")


def test_adapters_that_lie_apart_from_their_base_are_read_with_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, expert = Path("bases/ours.safetensors"), Path("experts/ft_1of1.safetensors")
    for path in (base, expert):
        path.parent.mkdir()
    write_tiny_base(base)
    write_adapter_expert(expert, base, index=1, of=1)
    run, config = RunFile(tables={"model": {"base": str(base)}}), SampleConfig(num=2, steps=2)
    drawn = [
        draw(argument, config, output=Path(draw.__name__), run=run, device="cpu")
        for draw, argument in ((sample, str(expert)), (ensemble_sample, [expert]))
    ]
    assert [images.shape for images in drawn] == [(8, 8, 1)] * 2
    assert export(expert, Path("pipeline"), run=run).max_difference < 1e-5
    with pytest.raises(MissingError, match=r"for sample, eval and export: base in \[model\]"):
        load_denoiser(expert)


def test_targets_are_attention_linear_all_or_a_glob(base: Callable[..., Denoiser]) -> None:
    network = base("sd").network
    modules = dict(network.named_modules())
    asked = (None, "attention", "linear", "all", "*.conv1", "mid_block.*")
    found = {targets: target_layers(network, targets) for targets in asked}
    assert found[None] == found["attention"]
    assert all(".attn" in name for name in found["attention"])
    assert {type(modules[name]) for name in found["linear"]} == {torch.nn.Linear}
    assert set(found["linear"]) < set(found["all"])
    assert all(name.endswith(".conv1") for name in found["*.conv1"])
    assert all(name.startswith("mid_block.") for name in found["mid_block.*"])
    for name in ("sd3", "dit", "flux", "wan"):
        assert all("attn" in layer for layer in target_layers(base(name).network, "attention"))
    for wrong, near in (
        ("down_blocks.1.attention.0.proj_i", "down_blocks.1.attentions.0.proj_in"),
        ("mid_blok.*", "mid_block.*"), ("*.to_qq", "*.to_q"), ("attnetion", "attention"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"a glob of names as {re.escape(repr(near))}"):
            target_layers(network, wrong)
    with pytest.raises(ConfigError, match=r"lora = 1000: .* a rank of 16 at most"):
        target_layers(network, "attention", 1000)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"lora": 0}, "lora = 0: expected a number above 0"),
        ({"lora_alpha": 4.0}, "lora_alpha belongs to lora = RANK"),
        ({"lora_targets": "linear"}, "lora_targets belongs to lora = RANK"),
        ({"lora": 4, "projection": "block"}, "adds full matrices"),
    ],
)
def test_settings_of_adapters_that_make_no_sense_are_refused(
    settings: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        FinetuneConfig(**settings)


@pytest.mark.parametrize("model", ["digits", "dit"])
def test_low_rank_experts_go_the_whole_way(
    model: str, pipelines: Callable[..., Path], captioned: Path, deme: Callable[..., Result],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    features = save_script(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()),
                           tmp_path / "features.pt")  # fmt: skip
    images = "digits" if model == "digits" else captioned
    source = model if model == "digits" else pipelines(model)
    experts = ["ft_1of2.safetensors", "ft_2of2.safetensors"]
    sampling = ("-n", 4, "--steps", 4)
    for words in (
        ("split", source, "-n", 2, "--data", images, "--force"),
        ("finetune", "--range", "all", "--lora", 2, "--lora-alpha", 4, "--lora-targets", "all",
         "--steps", 2, "--batch-size", 4, "--held-out", 0, "--lr", 1e-3),
        ("task-vector", *experts),
        ("merge", *experts, "-w", "0.5,0.5"),
        ("ensemble-sample", *experts, *sampling),
        ("sample", "merged.safetensors", *sampling),
        ("eval", "base.safetensors", *experts, "merged.safetensors", "--fid", images, "--features",
         features, "-n", 8, "--steps", 2),
        ("inspect", *experts, "merged.safetensors", "--verify"),
        ("export", "merged.safetensors", "lora.safetensors", "--lora", 4),
    ):  # fmt: skip
        result = deme(*words)
        assert result.exit_code == 0, (words, result.exception, result.stderr)
    record = read_record(Path(experts[0]), "expert")
    assert record.adapter == {"rank": 2, "alpha": 4.0, "targets": "all"}
    assert "adapter" in deme("inspect", experts[0]).stdout
    assert deme("export", experts[0], "x.safetensors", "--lora", 1).exit_code == 0


@pytest.mark.parametrize(
    ("words", "kind", "word"),
    [
        ("--range 1/2 --lora 2 --lora-targets x.*", ConfigError, "a glob of names as"),
        ("--from-scratch base.json --lora 2", ConfigError, "adapters of a base"),
        ("--range 1/2 --lora 2", MissingError, "pip install 'deme"),
    ],
)
def test_finetune_says_what_adapters_need(
    words: str, kind: type[DemeError], word: str, digits_base: Path, deme: Callable[..., Result],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.json").write_text('{"model": {}, "scheduler": {}}')
    if kind is MissingError:
        monkeypatch.setattr("deme_cli.fetch.find_spec", lambda name: None)
    given = ("--base", digits_base) if "--range" in words else ()
    error = deme("finetune", *words.split(), "--data", "digits", "--steps", 1, *given).exception
    assert isinstance(error, kind)
    assert word in str(error)
