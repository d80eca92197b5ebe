"""Candidates in memory: the weights of the merged file, and the gradient of a loss in coefficients.

For the gradient theta, tau and the network are float64, so that central differences are good to ten
digits; the loss that they are taken of is written out below in float64 and shares only the draws.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_adapter_expert, write_tiny_base, write_tiny_expert
from torch.func import functional_call

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import MergeConfig
from deme_cli.diffusion.projection import PREFIX
from deme_cli.errors import ConfigError
from deme_cli.merging.candidates import CandidateNetwork, Workbench
from deme_cli.merging.coefficients import Coefficients, Point
from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.inputs import Inputs, open_experts, open_inputs
from deme_cli.merging.methods import MethodSettings
from deme_cli.merging.objectives import Objective
from deme_cli.merging.plan import open_plan
from deme_cli.merging.search import SOUP_NAME
from deme_cli.run_file import RunFile

NUM, STEP = 12, 1e-4  # draws; of the central differences
METHODS = [MethodSettings(name, density=0.4) for name in ("linear", "ties", "dare")]
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


@pytest.mark.parametrize("method", [*METHODS, MethodSettings("slerp")], ids=lambda m: m.name)
def test_a_candidate_has_the_weights_of_the_merged_file(
    inputs: Inputs, tmp_path: Path, method: MethodSettings
) -> None:
    network = CandidateNetwork(inputs, device="cpu", dtype="fp32", method=method)
    output, is_slerp = tmp_path / "merged.safetensors", method.name == "slerp"
    network.at((2.0, -1.0))  # nothing of an earlier candidate stays
    for coefficients in ((1.0, 0.0), (0.25, 0.75)) if is_slerp else (W, (0.0, 0.0), (0.5, 0.5)):
        weights = network.at(coefficients).network.state_dict()
        merge_inputs(inputs, coefficients, output, method=method)
        for name, expected in load_tensors(output).items():
            assert torch.equal(weights[name], expected), name
    if is_slerp:
        with pytest.raises(ConfigError, match="method slerp has no slopes"):
            network.slopes()


def test_candidates_of_other_dtypes_are_rounded_once_and_set_in_place(inputs: Inputs) -> None:
    wide, narrow = (
        CandidateNetwork(inputs, device="cpu", dtype=dtype, method=METHODS[2])
        for dtype in ("fp32", "bf16")
    )
    module = narrow.at((0.0, 0.0)).network.requires_grad_(True)
    before = dict(module.named_parameters())
    expected = wide.at(W).network.state_dict()
    for name, parameter in narrow.at(W).network.named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16())
        assert parameter is before[name]
        assert parameter.is_leaf


@pytest.fixture
def triple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three experts of a base in float64, in the current folder."""
    monkeypatch.chdir(tmp_path)
    record = write_tiny_base(Path("base.safetensors"))
    wide = {k: v.double() for k, v in load_tensors(Path("base.safetensors")).items()}
    write_artifact(Path("base.safetensors"), wide, record)
    paths = [Path(f"ft_{index}of3.safetensors") for index in (1, 2, 3)]
    for index, path in enumerate(paths, start=1):
        write_tiny_expert(path, Path("base.safetensors"), index=index, of=3)
    return paths


Evaluate = Callable[..., tuple[float, Sequence[float] | None]]


def open_bench(
    paths: Sequence[Path], *, fixed: dict | None = None, **settings: object
) -> tuple[Workbench, Objective, Evaluate]:
    """What a descent measures with, its first objective, and its function of a point."""
    settings = {"search": "gradient", "num": NUM, "batch_size": 5, "report": False, **settings}
    plan = open_plan(
        paths, MergeConfig(**settings), run=RunFile(tables={"data": {"source": "digits"}}),
        output=Path("merged.safetensors"), fixed=fixed,
    )  # fmt: skip
    bench = Workbench(plan)
    objective = bench.open(plan.stages[0], plan.settings)
    return bench, objective, partial(bench.evaluate, [objective] * 2, lambda *progress: None)


def float64_loss(
    bench: Workbench, objective: Objective, taus: Sequence[dict] | None = None
) -> Callable[[Sequence[Any]], torch.Tensor]:
    """The loss at theta + sum_i w_i tau_i as a function of the point, all of it in float64.

    taus: of experts whose files hold no weights.
    """
    draws, schedule = objective.draws, objective.draws.schedule
    x0, _ = draws.examples.draw(draws.images.tolist(), flip=None, generator=None)
    eps, t = draws.noise(torch.arange(NUM)), draws.t
    x_t = schedule.add_noise(x0, eps, t).double()
    target = schedule.target(x0, eps, t) if draws.targets is None else draws.targets
    theta = load_tensors(bench.inputs.base.path)
    taus = taus or [
        {name: value - theta[name] for name, value in load_tensors(expert.path).items()}
        for expert in bench.inputs.experts
    ]
    network = bench.network().at([0.0] * len(taus)).network.requires_grad_(False)
    space = bench.plan.search.space

    def loss(point: Sequence[Any]) -> torch.Tensor:
        w = space.coefficients(tuple(point))
        weights = {
            name: value
            + sum(c * tau[name] for c, tau in zip(w.of(name), taus, strict=True) if name in tau)
            for name, value in theta.items()
        }
        output = functional_call(network, weights, (x_t, schedule.times(t))).sample
        assert output.dtype == torch.float64
        return (output - target.double()).square().mean()

    return loss


def central_differences(
    loss: Callable, point: Point, places: np.ndarray, step: float
) -> np.ndarray:
    slopes = []
    for index in places:
        ends = []
        for sign in (1, -1):
            moved = list(point)
            moved[index] += sign * step
            ends.append(float(loss(moved)))
        slopes.append((ends[0] - ends[1]) / (2 * step))
    return np.array(slopes)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("per", "fixed", "objective"),
    [
        ("model", None, "loss"),
        ("model", None, "experts"),
        ("layer", None, "loss"),
        ("block", {"*.attentions.*": (0.5, -0.25, 0.0)}, "loss"),
        ("model", {"*.bias": (1.0, 0.0, 0.5), "conv_*": (0.0, 0.25, 0.0)}, "loss"),
    ],
)
def test_the_gradient_is_that_of_central_differences(
    triple: list[Path], per: str, fixed: dict | None, objective: str
) -> None:
    bench, opened, evaluate = open_bench(triple, fixed=fixed, per=per, objective=objective)
    count, generator = len(bench.plan.search.space.labels), np.random.default_rng(0)
    point = tuple(map(float, generator.uniform(-0.5, 1.0, count)))
    found = evaluate(0, point, "")  # as shipped: a network in float32
    bench.network()._denoiser.network.double()
    exact, loss = evaluate(0, point, ""), float64_loss(bench, opened)
    places = generator.permutation(count)[:6]
    expected = central_differences(loss, point, places, STEP)
    assert np.count_nonzero(expected) == len(places)
    assert distance(np.array(exact[1])[places], expected) < 1e-6
    assert distance(np.array(found[1])[places], expected) < 1e-4
    assert exact[0] == pytest.approx(loss(point).item(), rel=1e-6)
    assert found[0] == pytest.approx(loss(point).item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("per", ["model", "block", "layer"])
def test_slopes_through_factors_are_those_of_autograd_on_dense_weights(
    per: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = write_tiny_base(Path("base.safetensors"))
    wide = {k: v.double() for k, v in load_tensors(Path("base.safetensors")).items()}
    write_artifact(Path("base.safetensors"), wide, record)
    paths, taus = [Path("a_1of2.safetensors"), Path("a_2of2.safetensors")], []
    for index, path in enumerate(paths, 1):
        targets = ("all", "linear")[index - 1]
        write_adapter_expert(path, Path("base.safetensors"), index=index, of=2, targets=targets)
        held = {name: side.double().flatten(1) for name, side in load_tensors(path).items()}
        taus.append({
            f"{name[5:-14]}.weight": (held[name.replace("lora_A", "lora_B")] @ down).view_as(
                wide[f"{name[5:-14]}.weight"])
            for name, down in held.items() if ".lora_A." in name
        })  # fmt: skip
    bench, opened, evaluate = open_bench(paths, per=per)
    count, generator = len(bench.plan.search.space.labels), torch.Generator().manual_seed(0)
    point = torch.rand(count, generator=generator, dtype=torch.float64, requires_grad=True)
    bench.network()._denoiser.network.double()
    loss = float64_loss(bench, opened, taus)
    with torch.enable_grad():
        value = loss(list(point))
        value.backward()
    bench.network()._denoiser.network.requires_grad_(True)
    found = evaluate(0, tuple(point.tolist()), "")
    assert found[0] == pytest.approx(value.item(), rel=1e-6)
    assert np.count_nonzero(found[1]) > count / 2
    np.testing.assert_allclose(found[1], point.grad.numpy(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_what_a_method_makes_of_the_task_vectors_has_slopes_too(
    triple: list[Path], method: str
) -> None:
    bench, opened, evaluate = open_bench(triple, method=method, density=0.3)
    bench.network()._denoiser.network.double()
    point = (0.5, 0.75, 0.25)
    found = evaluate(0, point, "")[1]

    def loss(w: Sequence[float]) -> float:
        return opened.draws.errors(bench.network().at(w).network).mean().item()

    expected = central_differences(loss, point, np.arange(3), 0.01)
    assert distance(np.array(found), expected) < 1e-3


def test_slopes_are_taken_where_they_are_needed_and_the_loss_is_finite(triple: list[Path]) -> None:
    _, _, evaluate = open_bench(triple)
    point = (0.5, 0.5, 0.0)
    value, slopes = evaluate(0, point, "")
    for stage, name in ((1, ""), (0, SOUP_NAME)):
        plain = evaluate(stage, point, name)
        assert plain == (pytest.approx(value, rel=1e-6), None)
    assert len(slopes) == 3
    weights = load_tensors(triple[0])
    weights["conv_in.bias"] *= float("nan")
    write_artifact(triple[0], weights, read_record(triple[0]))
    _, _, evaluate = open_bench(triple)
    value, slopes = evaluate(0, point, "")
    assert (math.isfinite(value), slopes) == (False, None)
    assert math.isfinite(evaluate(0, (0.0, 0.5, 0.5), "")[0]), "nothing of it stays"


_MEMORY = """
import gc, json, sys
from pathlib import Path
sys.path.append({tests!r})
from test_candidates import open_bench

def anonymous():
    gc.collect()
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous"))

found = {{}}
for count in (2, 2, 8):  # once to warm up
    before = anonymous()
    bench = open_bench([Path(f"ft_{{i}}of8.safetensors") for i in range(1, count + 1)])
    bench[2](0, (0.1,) * count, "")
    found[count] = anonymous() - before
    del bench
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="of Linux")
def test_memory_holds_one_network_and_its_gradient_whatever_the_number_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base.safetensors"
    write_tiny_base(base, block_out_channels=[128, 256])
    size = base.stat().st_size / 1024  # KiB
    for index in range(1, 9):
        write_tiny_expert(tmp_path / f"ft_{index}of8.safetensors", base, index=index, of=8)
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY.format(tests=str(here.parent))],
        capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": f"{here.parents[2]}:{here.parents[1]}", "OMP_NUM_THREADS": "1",
             "MALLOC_TRIM_THRESHOLD_": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert size > 20_000
    assert found["8"] < found["2"] + size / 2
    assert found["8"] < 3 * size
