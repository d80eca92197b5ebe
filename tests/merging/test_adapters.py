"""Experts that hold adapters are merged as the weights they stand for: sum_i w_i B_i A_i."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import write_adapter_expert, write_tiny_base, write_tiny_expert
from typer.testing import Result

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.diffusion.denoiser import load_denoiser, stored_in
from deme_cli.errors import ArtifactError
from deme_cli.merging.candidates import CandidateNetwork
from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.inputs import Inputs, open_experts, open_inputs
from deme_cli.merging.methods import MethodSettings
from deme_cli.merging.tensor_stream import inner_products

Deme = Callable[..., Result]
ADAPTERS = [Path("a_1of2.safetensors"), Path("a_2of2.safetensors")]
FUSED = [Path("f_1of2.safetensors"), Path("f_2of2.safetensors")]
METHODS = [MethodSettings(name, density=0.4)
           for name in ("linear", "ties", "dare", "slerp", "model-stock")]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two experts of adapters, and the same with their weights whole."""
    monkeypatch.chdir(tmp_path)
    base = Path("base.safetensors")
    write_tiny_base(base)
    for index, (path, fused) in enumerate(zip(ADAPTERS, FUSED, strict=True), start=1):
        record = write_adapter_expert(path, base, index=index, of=2)
        weights = load_denoiser(path).network.state_dict()
        write_artifact(fused, weights, replace(record, holds="all", adapter=None))
    return tmp_path


def opened(paths: list[Path]) -> Inputs:
    return open_inputs(Path("base.safetensors"), open_experts(paths, "expert", "task-vector"))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_merges_adapters_as_the_weights_they_stand_for(
    method: MethodSettings, deme: Deme
) -> None:
    coefficients = None if method.name == "model-stock" else (0.3, 0.7)
    dense = FUSED
    if method.name == "dare":  # what it drops goes by the fingerprint of the expert
        deme("task-vector", *ADAPTERS)
        dense = [Path("tv_1of2.safetensors"), Path("tv_2of2.safetensors")]
    for paths, output in ((ADAPTERS, Path("m.safetensors")), (dense, Path("n.safetensors"))):
        merge_inputs(opened(paths), coefficients, output, method=method)
    ours, theirs = (load_tensors(Path(name)) for name in ("m.safetensors", "n.safetensors"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    network = CandidateNetwork(opened(ADAPTERS), device="cpu", dtype="fp32", method=method)
    weights = network.at(coefficients).network.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in ours.items())


def test_the_sum_of_products_is_that_of_float64_and_not_what_peft_makes_of_the_factors() -> None:
    base, factors = load_denoiser(Path("base.safetensors")), [*map(load_tensors, ADAPTERS)]
    w = (0.3, 0.7)
    merge_inputs(opened(ADAPTERS), w, Path("m.safetensors"))
    merged, start = load_tensors(Path("m.safetensors")), load_tensors(Path("base.safetensors"))
    for name, theta in start.items():
        sides = [f"unet.{name.removesuffix('.weight')}.lora_{side}.weight" for side in "AB"]
        total = theta.double()
        for c, held in zip(w, factors, strict=True):
            if sides[0] in held:
                down, up = (held[side].double().flatten(1) for side in sides)
                total = total + c * (up @ down).view_as(theta)
        torch.testing.assert_close(merged[name].double(), total, rtol=0, atol=1e-6)
    layer = "down_blocks.1.attentions.0.to_q"
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=[layer])
    model = peft.get_peft_model(base.network, config, adapter_name="1")
    model.add_adapter("2", config)
    for number, held in zip("12", factors, strict=True):
        for side in "AB":
            parameter = model.get_parameter(f"base_model.model.{layer}.lora_{side}.{number}.weight")
            parameter.data = held[f"unet.{layer}.lora_{side}.weight"]
    model.add_weighted_adapter(["1", "2"], list(w), "sum", combination_type="linear")
    change = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("sum")
    ours = merged[f"{layer}.weight"] - start[f"{layer}.weight"]
    assert (change - ours).abs().max() > 0.1 * ours.abs().max()  # of averaged factors


def test_norms_products_and_task_vectors_are_those_of_the_weights(deme: Deme) -> None:
    for ours, theirs in zip(inner_products(opened(ADAPTERS)).values(),
                            inner_products(opened(FUSED)).values(), strict=True):  # fmt: skip
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert deme("task-vector", *ADAPTERS).exit_code == 0
    vector, record = load_tensors(Path("tv_1of2.safetensors")), read_record(ADAPTERS[0], "expert")
    base, fused = load_tensors(Path("base.safetensors")), load_tensors(FUSED[0])
    for name, tau in vector.items():
        torch.testing.assert_close(tau, fused[name] - base[name], rtol=0, atol=1e-6)
    told = read_record(Path("tv_1of2.safetensors"), "task-vector")
    assert (told.holds, told.expert) == ("all", record.fingerprint)
    merge_inputs(opened([Path("tv_1of2.safetensors"), ADAPTERS[1]]), (1, 1), Path("m.safetensors"))
    merge_inputs(opened(ADAPTERS), (1, 1), Path("n.safetensors"))
    torch.testing.assert_close(
        *(load_tensors(Path(f"{name}.safetensors")) for name in "mn"), rtol=0, atol=1e-6
    )


def test_a_bf16_base_and_full_experts_beside_adapters_are_merged_densely(deme: Deme) -> None:
    base = read_record(Path("base.safetensors"), "base")
    half = stored_in(load_tensors(Path("base.safetensors")), "bf16", "base")
    base = write_artifact(Path("base.safetensors"), half, base)
    record = write_adapter_expert(ADAPTERS[0], Path("base.safetensors"), index=1, of=2)
    write_tiny_expert(Path("b.safetensors"), Path("base.safetensors"), index=2, of=2)
    said = deme(
        "merge", ADAPTERS[0], "b.safetensors", "-w", "0.4,0.6", "-o", "m.safetensors"
    ).stderr
    assert "some experts hold adapters, others whole weights: merged as" in " ".join(said.split())
    fused = load_denoiser(ADAPTERS[0]).network.state_dict()
    other, merged = load_tensors(Path("b.safetensors")), load_tensors(Path("m.safetensors"))
    for name, theta in half.items():
        start = theta.double()
        taus = fused[name].double() - start, other[name].double() - start
        exact = (start + 0.4 * taus[0] + 0.6 * taus[1]).bfloat16()
        torch.testing.assert_close(merged[name], exact, rtol=2**-7, atol=1e-6)
    assert record.base == base.fingerprint


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda held, a, b: held.update({a: held[a][:1]}), "are no factors of"),
        (lambda held, a, b: held.pop(b), "are no factors of"),
        (lambda held, a, b: held.update({a: held[a][:, :1]}), "are no factors of"),
        (lambda held, a, b: held.update({"unet.x.bias": held[a]}), "is no factor of a pair"),
    ],
)
def test_adapters_that_do_not_fit_their_base_are_refused_by_name(
    change: Callable[..., object], word: str
) -> None:
    held, record = load_tensors(ADAPTERS[0]), read_record(ADAPTERS[0], "expert")
    sides = [f"unet.mid_block.attentions.0.to_q.lora_{side}.weight" for side in "AB"]
    change(held, *sides)
    write_artifact(ADAPTERS[0], held, record)
    with pytest.raises(ArtifactError, match=word):
        opened(ADAPTERS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[1:3], ids=lambda method: method.name)
def test_methods_on_dense_differences_of_adapters_take_bounded_memory(
    method: MethodSettings, write_inputs: Callable[..., tuple[Path, list[Path]]]
) -> None:
    names, side, rank = [f"{i}.weight" for i in range(24)], 1024, 2
    base, paths = write_inputs(dict.fromkeys(names, torch.zeros(side, side)), [{}, {}])
    for path in paths:
        held = {}
        for name in names:
            held[f"unet.{name.replace('weight', 'lora_A.weight')}"] = torch.randn(rank, side)
            held[f"unet.{name.replace('weight', 'lora_B.weight')}"] = torch.randn(side, rank)
        write_artifact(path, held, replace(read_record(path, "expert"), holds="adapter"))
    inputs = open_inputs(base, open_experts(paths, "expert"))
    tracemalloc.start()
    merge_inputs(inputs, (0.3, 0.7), Path("m.safetensors"), method=method)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(names) * side * side * 4 / 3  # of one dense difference of the two
