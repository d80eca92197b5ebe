"""The gradient of the objective in the coefficients, and what a descent along it keeps to.

The network, theta and tau are float64 here, so that central differences are good to ten digits; the
loss that they are taken of is written out below in float64 and shares only the draws.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_base, write_tiny_expert
from torch.func import functional_call

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import DataConfig, MergeConfig, SampleConfig
from deme_cli.merging.candidates import Evaluator
from deme_cli.merging.coefficients import groups_of
from deme_cli.merging.inputs import Inputs, open_experts, open_inputs
from deme_cli.merging.methods import LINEAR, MethodSettings
from deme_cli.merging.objectives import HeldOutLoss, Workbench
from deme_cli.merging.plan import Measure
from deme_cli.merging.space import SOUP_NAME, Space
from deme_cli.merging.successive_halving import Stage

NUM, STEP = 12, 1e-4  # draws; of the central differences
PAIR = ("ft_1of4.safetensors", "ft_3of4.safetensors")


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """A base in float64 with three experts."""
    base = tmp_path / "base.safetensors"
    record = write_tiny_base(base)
    write_artifact(base, {k: v.double() for k, v in load_tensors(base).items()}, record)
    paths = [tmp_path / f"ft_{index}of3.safetensors" for index in (1, 2, 3)]
    for index, path in enumerate(paths, start=1):
        write_tiny_expert(path, base, index=index, of=3)
    return open_inputs(base, open_experts(paths, "expert"))


def space_of(inputs: Inputs, per: str, fixed: dict[str, tuple[float, ...]] | None = None) -> Space:
    names, count = list(inputs.base.tensors), len(inputs.experts)
    groups = [glob for glob in groups_of(names, per) if glob not in (fixed or {})]
    return Space(
        tuple(f"{i}" for i in range(count)), ((-1.0, 2.0),) * count, (1 / count,) * count,
        groups=tuple(groups), has_rest=per != "layer", fixed=fixed or {},
        shares=(1.0,) * (len(groups) + (per != "layer")),
    )  # fmt: skip


def open_evaluator(inputs: Inputs, space: Space, name: str, method: MethodSettings) -> Evaluator:
    bench = Workbench(
        Measure(DataConfig(source="digits"), "digits", "clean", SampleConfig()), inputs.base_record
    )
    evaluator = Evaluator(
        inputs, space, method=method, device="cpu", dtype="fp32", with_slopes=True
    )
    config = MergeConfig(num=NUM, batch_size=5)
    objective = bench.open(Stage(name, NUM, 1), config, experts=evaluator.ensemble)
    evaluator.objectives = [objective]
    return evaluator


def float64_loss(evaluator: Evaluator, inputs: Inputs) -> Callable[[Sequence[float]], float]:
    """The loss at theta + sum_i w_i tau_i as a function of the point, all of it in float64."""
    objective = evaluator.objectives[0]
    assert isinstance(objective, HeldOutLoss)
    draws, schedule = objective.draws, objective.draws.schedule
    everyone = torch.arange(NUM)
    x0, _ = draws.examples.draw(draws.images.tolist(), flip=None, generator=None)
    eps, t = draws.noise(everyone), draws.t
    x_t = schedule.add_noise(x0, eps, t).double()
    target = schedule.target(x0, eps, t) if draws.targets is None else draws.targets
    theta = load_tensors(inputs.base.path)
    taus = [
        {name: value - theta[name] for name, value in load_tensors(expert.path).items()}
        for expert in inputs.experts
    ]
    network = evaluator.network.at(family_zero(inputs)).network

    @torch.no_grad()
    def loss(point: Sequence[float]) -> float:
        w = evaluator.space.coefficients(tuple(point))
        weights = {
            name: value + sum(c * tau[name] for c, tau in zip(w.of(name), taus, strict=True))
            for name, value in theta.items()
        }
        output = functional_call(network, weights, (x_t, schedule.times(t))).sample
        assert output.dtype == torch.float64
        return (output - target.double()).square().mean().item()

    return loss


def family_zero(inputs: Inputs) -> list[float]:
    return [0.0] * len(inputs.experts)


def central_differences(loss: Callable, point: Sequence[float], places: np.ndarray) -> np.ndarray:
    slopes = []
    for index in places:
        ends = []
        for sign in (1, -1):
            moved = list(point)
            moved[index] += sign * STEP
            ends.append(loss(moved))
        slopes.append((ends[0] - ends[1]) / (2 * STEP))
    return np.array(slopes)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("per", "fixed", "objective"),
    [
        ("model", None, "loss"),
        ("model", None, "experts"),
        ("block", None, "loss"),
        ("layer", None, "loss"),
        ("block", {"mid_block.*": (0.5, -0.25, 0.0)}, "loss"),
        ("block", {"*.attentions.*": (0.5, -0.25, 0.0)}, "loss"),
        ("model", {"*.bias": (1.0, 0.0, 0.5), "conv_*": (0.0, 0.25, 0.0)}, "loss"),
    ],
)
def test_the_gradient_is_that_of_central_differences(
    inputs: Inputs, per: str, fixed: dict | None, objective: str
) -> None:
    space = space_of(inputs, per, fixed)
    evaluator = open_evaluator(inputs, space, objective, LINEAR)
    generator = np.random.default_rng(0)
    point = tuple(map(float, generator.uniform(-0.5, 1.0, space.dimensions)))
    found = evaluator(0, point)  # as shipped: a network in float32
    evaluator.network._denoiser.network.double()
    exact = evaluator(0, point)
    loss = float64_loss(evaluator, inputs)
    places = generator.permutation(space.dimensions)[:20]
    expected = central_differences(loss, point, places)
    assert np.count_nonzero(expected) == len(places)
    assert distance(np.array(exact[1]["slopes"])[places], expected) < 1e-6
    assert distance(np.array(found[1]["slopes"])[places], expected) < 1e-4
    assert exact[0] == pytest.approx(loss(point), rel=1e-6)
    assert found[0] == pytest.approx(loss(point), rel=1e-5)


def test_the_gradient_of_all_blocks_adds_up_to_that_of_the_whole(inputs: Inputs) -> None:
    found = {}
    for per in ("model", "block", "layer"):
        space = space_of(inputs, per)
        evaluator = open_evaluator(inputs, space, "loss", LINEAR)
        slopes = evaluator(0, space.everywhere((0.5, 0.25, -0.5)))[1]["slopes"]
        found[per] = np.array(slopes).reshape(-1, 3).sum(axis=0)
    np.testing.assert_allclose(found["block"], found["model"], rtol=1e-9)
    np.testing.assert_allclose(found["layer"], found["model"], rtol=1e-9)


@pytest.mark.parametrize("name", ["ties", "dare"])
def test_what_a_method_makes_of_the_task_vectors_has_slopes_too(inputs: Inputs, name: str) -> None:
    method = MethodSettings(name, density=0.3)
    space, point = space_of(inputs, "model"), (0.5, 0.75, 0.25)
    evaluator = open_evaluator(inputs, space, "loss", method)
    evaluator(0, point)
    evaluator.network._denoiser.network.double()
    found = evaluator(0, point)[1]["slopes"]

    def loss(w: Sequence[float]) -> float:
        errors = evaluator.objectives[0].draws.errors(evaluator.network.at(w).network)
        return errors.mean().item()

    ends = [[loss(np.array(point) + sign * 0.01 * unit) for sign in (1, -1)] for unit in np.eye(3)]
    expected = np.array([(high - low) / 0.02 for high, low in ends])
    assert distance(np.array(found), expected) < 1e-3


def test_points_of_the_soup_and_of_other_rungs_bring_no_slopes(inputs: Inputs) -> None:
    space = space_of(inputs, "model")
    evaluator = open_evaluator(inputs, space, "loss", LINEAR)
    evaluator.objectives = [evaluator.objectives[0]] * 2
    plain = evaluator(1, (0.5, 0.5, 0.0))
    assert "slopes" not in plain[1]
    assert evaluator(0, (0.5, 0.5, 0.0), SOUP_NAME) == plain
    sloped = evaluator(0, (0.5, 0.5, 0.0))
    assert sloped[0] == pytest.approx(plain[0], rel=1e-6)


def test_a_loss_that_is_not_finite_has_no_slopes(inputs: Inputs) -> None:
    path = inputs.experts[0].path
    weights = load_tensors(path)
    weights["conv_in.bias"] *= float("nan")
    write_artifact(path, weights, read_record(path))
    again = open_inputs(inputs.base.path, open_experts([p.path for p in inputs.experts], "expert"))
    evaluator = open_evaluator(again, space_of(again, "model"), "loss", LINEAR)
    found = evaluator(0, (0.5, 0.5, 0.5))
    assert not math.isfinite(found[0])
    assert found[1] == {}
    assert math.isfinite(evaluator(0, (0.0, 0.5, 0.5))[0])


@pytest.mark.parametrize("per", ["block", "layer"])
def test_finer_coefficients_are_never_worse_than_the_same_everywhere(
    run_folder: Path, deme: Callable, per: str
) -> None:
    words = ("--search", "gradient", "--num", "64", "--evaluations", "12", "--no-report", "--json")
    whole = json.loads(deme("merge", *PAIR, *words).stdout)
    finer = json.loads(deme("merge", *PAIR, *words, "--per", per, "-o", "b.safetensors").stdout)
    assert finer["objective"] <= whole["objective"]


_MEMORY = """
import gc, json, sys
from pathlib import Path
from deme_cli.merging.inputs import open_inputs, open_experts
sys.path.insert(0, {tests!r})
from test_gradient import LINEAR, open_evaluator, space_of

def anonymous():
    gc.collect()
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous"))

found = {{}}
for count in (2, 2, 8):  # once to warm up
    paths = [Path(f"ft_{{i}}of8.safetensors") for i in range(1, count + 1)]
    inputs = open_inputs(Path("base.safetensors"), open_experts(paths, "expert"))
    before = anonymous()
    evaluator = open_evaluator(inputs, space_of(inputs, "model"), "loss", LINEAR)
    evaluator(0, (0.1,) * count)
    found[count] = anonymous() - before
    del evaluator
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
    code = _MEMORY.format(tests=str(here.parent))
    paths = f"{here.parents[3]}:{here.parents[2]}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert size > 20_000
    assert found["8"] < found["2"] + size / 2
    assert found["8"] < 3 * size
