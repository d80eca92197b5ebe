"""Candidates in memory: the weights of the merged file, and slopes of a loss along the tau_i."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_base, write_tiny_expert
from torch import Tensor

from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.diffusion.projection import PREFIX
from deme_cli.errors import ConfigError
from deme_cli.merging import candidates
from deme_cli.merging.candidates import CandidateNetwork
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.inputs import Inputs, open_experts, open_inputs
from deme_cli.merging.methods import MethodSettings

LINEAR, TIES, DARE = (MethodSettings(name, density=0.4) for name in ("linear", "ties", "dare"))
W = Coefficients((0.3, -0.7), {"mid_block.*": (1.0, 0.5), f"{PREFIX}.*": (0.5, 0.25)})
WIDTHS = {"down_blocks_0": 8, "down_blocks_1": 16, "mid_block": 16, "up_blocks_0": 16,
          "up_blocks_1": 8}  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """Two experts with block projections."""
    base = tmp_path / "base.safetensors"
    write_tiny_base(base)
    paths = []
    for index in (1, 2):
        paths.append(tmp_path / f"ft_{index}of2.safetensors")
        record = write_tiny_expert(paths[-1], base, index=index, of=2)
        weights = load_tensors(paths[-1])
        generator = torch.Generator().manual_seed(index)
        for block, width in WIDTHS.items():
            noise = 0.05 * torch.randn(width, width, generator=generator)
            weights[f"{PREFIX}.{block}.weight"] = torch.eye(width) + noise
        write_artifact(paths[-1], weights, replace(record, projection="block"))
    return open_inputs(base, open_experts(paths, "expert"))


@pytest.mark.parametrize("method", [LINEAR, TIES, DARE], ids=lambda m: m.name)
def test_a_candidate_has_the_weights_of_the_merged_file(
    inputs: Inputs, tmp_path: Path, method: MethodSettings
) -> None:
    network = CandidateNetwork(inputs, device="cpu", dtype="fp32", method=method)
    network.at((9.0, -3.0))  # nothing of an earlier candidate stays
    output = tmp_path / "merged.safetensors"
    for coefficients in (W, (0.0, 0.0), (1.0, 0.0), (0.5, 0.5)):
        weights = network.at(coefficients).network.state_dict()
        merge_inputs(inputs, coefficients, output, method=method)
        for name, expected in load_tensors(output).items():
            assert torch.equal(weights[name], expected), name


def test_a_streamed_slerp_candidate_is_the_merged_file(inputs: Inputs, tmp_path: Path) -> None:
    slerp, output = MethodSettings("slerp"), tmp_path / "merged.safetensors"
    network = CandidateNetwork(inputs, device="cpu", dtype="fp32", method=slerp)
    weights = network.at((0.25, 0.75)).network.state_dict()
    merge_inputs(inputs, (0.25, 0.75), output, method=slerp)
    assert all(torch.equal(weights[name], t) for name, t in load_tensors(output).items())
    with pytest.raises(ConfigError, match="w_1 \\+ w_2 = 1"):
        network.at((0.5, 0.6))
    with pytest.raises(ConfigError, match="method slerp has no slopes"):
        network.slopes()


def test_candidates_of_other_dtypes_are_rounded_once(inputs: Inputs) -> None:
    wide = CandidateNetwork(inputs, device="cpu", dtype="fp32", method=DARE).at(W)
    narrow = CandidateNetwork(inputs, device="cpu", dtype="bf16", method=DARE).at(W)
    expected = wide.network.state_dict()
    for name, tensor in narrow.network.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype))


def test_parameters_that_ask_for_gradients_are_set_in_place(inputs: Inputs) -> None:
    network = CandidateNetwork(inputs, device="cpu", dtype="fp32")
    module = network.at((0.0, 0.0)).network.requires_grad_(True)
    before = {name: (p, p.detach().clone()) for name, p in module.named_parameters()}
    after = network.at((0.5, 0.5)).network
    for name, parameter in after.named_parameters():
        assert parameter is before[name][0]
        assert parameter.requires_grad
        assert parameter.is_leaf
    assert not torch.equal(after.conv_in.weight, before["conv_in.weight"][1])


@pytest.mark.parametrize("method", [LINEAR, TIES, DARE], ids=lambda m: m.name)
def test_slopes_are_the_derivatives_of_a_loss(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, method: MethodSettings
) -> None:
    """L = sum sin(theta(w)) c: autograd through w in float64."""
    monkeypatch.setattr(candidates, "PIECE", 999)
    network = CandidateNetwork(inputs, device="cpu", dtype="fp32", method=method)
    names = [name for name, _ in network.at((0.0, 0.0)).network.named_parameters()]
    points = []
    for w in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        state = network.at(w).network.state_dict()
        points.append({name: state[name].double().clone() for name in names})
    generator = torch.Generator().manual_seed(0)
    scales = {name: torch.randn(points[0][name].shape, generator=generator).double()
              for name in names}  # fmt: skip

    def loss(name: str, w: Tensor) -> Tensor:
        theta, one, two = (point[name] for point in points)
        return ((theta + w[0] * (one - theta) + w[1] * (two - theta)).sin() * scales[name]).sum()

    at = (0.3, -0.7)
    module = network.at(at).network.requires_grad_(True)
    total = sum((p.double().sin() * scales[name]).sum() for name, p in module.named_parameters())
    total.backward()
    module.conv_out.bias.grad = None
    slopes = network.slopes()
    assert slopes.keys() == set(names) - {"conv_out.bias"}
    for name, found in slopes.items():
        w = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        loss(name, w).backward()
        size = scales[name].norm().item()
        assert found == pytest.approx(w.grad.tolist(), rel=1e-4, abs=1e-6 * size), name


def test_coefficients_that_do_not_fit_are_refused(inputs: Inputs) -> None:
    network = CandidateNetwork(inputs, device="cpu", dtype="fp32")
    with pytest.raises(ConfigError, match="1 coefficients for 2 experts"):
        network.at((0.5,))
    with pytest.raises(ConfigError, match="matches no tensor"):
        network.at(Coefficients((0.5, 0.5), {"nothing.*": (1.0, 1.0)}))


@pytest.fixture
def halves(inputs: Inputs, tmp_path: Path) -> Callable[[torch.dtype], Inputs]:
    """The same inputs stored in another dtype."""

    def write(dtype: torch.dtype) -> Inputs:
        folder = tmp_path / str(dtype)
        base = {name: t.to(dtype) for name, t in load_tensors(inputs.base.path).items()}
        record = write_artifact(folder / "base.safetensors", base, inputs.base_record)
        paths = []
        for expert in inputs.experts:
            paths.append(folder / expert.path.name)
            weights = {name: t.to(dtype) for name, t in load_tensors(expert.path).items()}
            write_artifact(paths[-1], weights, replace(expert.record, base=record.fingerprint))
        return open_inputs(folder / "base.safetensors", open_experts(paths, "expert"))

    return write


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_files_of_other_dtypes_give_the_unrounded_merge(
    halves: Callable, tmp_path: Path, dtype: torch.dtype
) -> None:
    inputs, output = halves(dtype), tmp_path / "merged.safetensors"
    network = CandidateNetwork(inputs, device="cpu", dtype="fp32", method=DARE)
    weights = network.at(W).network.state_dict()
    merge_inputs(inputs, W, output, method=DARE)
    for name, expected in load_tensors(output).items():
        found = weights[name].to(dtype) if dtype != torch.float64 else weights[name].double()
        wide = 1e-6 if dtype == torch.float64 else torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=wide, atol=wide)
