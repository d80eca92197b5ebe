"""Processes of one launch train what one would; they stop, fail and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_base
from launched import ends, launch, stop_when, succeed

from deme_cli.artifacts import load_tensors
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.distributed import World
from deme_cli.errors import ConfigError
from deme_cli.training.setup import Plan, require_processes
from deme_cli.training.sharding import add_up_gradients, buckets


class Doubling(World):
    """Two processes with the same gradients, of which this is one."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.sizes: list[int] = []

    def add_up(self, tensor: torch.Tensor) -> None:
        self.sizes.append(tensor.numel())
        tensor.mul_(2)


def test_gradients_are_added_up_in_their_places_one_bucket_a_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (), (5,), (2, 1, 2)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters += [torch.nn.Parameter(torch.zeros(6, dtype=torch.bfloat16)), parameters[0]]
    for parameter in parameters[:-1]:
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = drawn.mT.contiguous().mT if drawn.ndim == 2 else drawn  # any strides
    parameters[1].grad = None
    before = [None if p.grad is None else p.grad.clone() for p in parameters[:-1]]
    world = Doubling()
    add_up_gradients(parameters[:-1], world)
    assert world.sizes == [12 + 5 + 4, 6]
    for parameter, gradient in zip(parameters, before, strict=False):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            assert torch.equal(parameter.grad, 2 * gradient)
    tensors = [torch.zeros(n) for n in (10, 10, 30, 1, 1)]  # a bucket is full before the next one
    sizes = [[len(t) for t in bucket] for bucket in buckets(tensors, num_bytes=80)]
    assert sizes == [[10, 10], [30], [1, 1]]


def test_what_processes_cannot_share_is_refused() -> None:
    for changes, settings, word in [
        ({"shard": True, "dtype": "fp16"}, {}, "choose bf16"),
        ({"shard": True, "compile": "on"}, {}, "--compile on"),
        ({}, {"multitask": "uw"}, "whole batches"),
        ({}, {"batch_size": 1}, "expected one image for each"),
    ]:
        plan = Plan(Path("base"), DataConfig(), FinetuneConfig(**settings), **changes)
        with pytest.raises(ConfigError, match=word):
            require_processes(plan, 2)


# Processes of their own. Batches of five, so that shares are unequal.
WORDS = [
    "finetune", "--range", "1/2", "--data", "digits", "--device", "cpu", "--batch-size", "5",
    "--held-out", "16",
]  # fmt: skip
ENDLESS = ["--steps", "100000", "--checkpoint-every", "5"]


def steps_of(folder: Path) -> list[int]:
    path = folder / "ft_1of2.metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def alone(deme: Callable, folder: Path, *words: str) -> Path:
    """The expert that one process trains in a folder of its own."""
    path = folder / "alone.safetensors"
    done = deme(*words, "-o", path, "--base", folder / "base.safetensors")
    assert done.exit_code == 0, done.exception
    return path


def require_close(found: Path, wanted: Path) -> None:
    """The same weights, and the same function, but for rounding.

    Adam divides a gradient by its own size, and where that is nothing but rounding noise makes
    steps of it. Biases of keys are such (softmax does not see them): they wander between any two
    orders of summation and change nothing. Of other weights single elements are near it.
    """
    one, other = load_tensors(found), load_tensors(wanted)
    names = [name for name in one if not name.endswith("to_k.bias")]
    apart = torch.cat([(one[name] - other[name]).flatten() for name in names])
    assert apart.abs().max() <= 2e-6
    assert apart.square().mean().sqrt() <= 1e-7
    networks = [load_denoiser(path).network for path in (found, wanted)]
    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [predict(network, x_t, torch.tensor([3, 20, 40, 90])) for network in networks]
    torch.testing.assert_close(*outputs, rtol=0, atol=5e-6)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny_base(tmp_path / "base.safetensors")
    return tmp_path


def require_same_curves(folder: Path) -> None:
    curves = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (folder / "ft_1of2.metrics.jsonl", folder / "alone.metrics.jsonl")
    ]
    for one, other in zip(*curves, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert (one["held_out"] is None) == (other["held_out"] is None)
        assert (one["held_out"] or 0) == pytest.approx(other["held_out"] or 0, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["--loss-weighting", "uncertainty", "--accumulation", "2"],
        ["--shard", "--ema-lengths", "0.1", "--snapshot-every", "10"],
        ["--shard", "--projection", "block", "--micro-batch", "1", "--accumulation", "2"],
    ],
)
def test_processes_train_what_one_does_also_where_they_divide_the_network(
    deme, folder: Path, settings: list[str]
) -> None:
    words = [*WORDS, "--steps", "20", "--checkpoint-every", "10", *settings]
    output = succeed(launch(folder, *words, "--json"))
    paths = json.loads(output)["paths"]
    assert paths[0] == "ft_1of2.safetensors"
    assert len(paths) == (4 if "--ema-lengths" in settings else 1)
    wanted = alone(deme, folder, *(word for word in words if word != "--shard"))
    require_close(folder / paths[0], wanted)
    for path in paths[1:]:
        require_close(folder / path, folder / "alone.snapshots" / Path(path).name)
    require_same_curves(folder)


@pytest.mark.slow
def test_a_stopped_run_goes_on_divided_undivided_and_alone_to_the_same_expert(
    deme, folder: Path
) -> None:
    words = [*WORDS, "--steps", "40", "--checkpoint-every", "5", "--projection", "block"]
    for num, more in ((2, []), (2, ["--shard"]), (1, [])):
        enough = len(steps_of(folder)) + 1
        codes, said = stop_when(
            lambda enough=enough: len(steps_of(folder)) >= enough,
            launch(folder, *words, *more, num=num), rank=num - 1,  # the others are not asked
        )  # fmt: skip
        assert (codes, len(said)) == ([75] * num, 1), said
        assert "run the same command again" in said[0]
        names = {path.name for path in folder.iterdir()}
        assert names == {"base.safetensors", ".ft_1of2.checkpoint", "ft_1of2.metrics.jsonl"}
    assert steps_of(folder)[-1] < 40
    assert ends(launch(folder, *words, "--shard", "--resume", num=3)) == ([0, 0, 0], [])
    assert steps_of(folder) == list(range(5, 41, 5))
    require_close(folder / "ft_1of2.safetensors", alone(deme, folder, *words))


@pytest.mark.slow
def test_an_error_of_one_process_is_told_once_and_ends_all(
    folder: Path, image_folder: Path
) -> None:
    broken = image_folder / "07.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    words = [*WORDS, "--data", "images", "--crop", "random", "--held-out", "0", *ENDLESS]
    codes, said = ends(launch(folder, *words, num=3))
    assert (codes, len(said)) == ([4, 4, 4], 1), said
    assert "07.png: broken image" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "words"), [(0, []), (1, ["--shard"])])
def test_the_death_of_one_process_is_told_once_and_ends_all(
    folder: Path, killed: int, words: list[str]
) -> None:
    processes = launch(folder, *WORDS, *ENDLESS, *words, num=3)
    is_kept = (folder / ".ft_1of2.checkpoint").exists
    # waits for two minutes, not for the half hour that a silent one may take
    codes, said = stop_when(is_kept, processes, killed, by=signal.SIGKILL)
    assert codes[killed] == -signal.SIGKILL
    assert sorted(codes) == [-signal.SIGKILL, 1, 1]
    assert len(said) == 1, said
    assert "without a word" in said[0]
    assert (folder / ".ft_1of2.checkpoint").exists()


@pytest.mark.slow
def test_processes_with_other_settings_or_none_of_their_own_are_refused(folder: Path) -> None:
    def refused(code: int, word: str, *words: str, **by_rank: Callable) -> None:
        codes, said = ends(launch(folder, *words, **by_rank))
        assert (codes, len(said)) == ([code, code], 1), said
        assert word in said[0]

    def own_range(rank: int) -> list[str]:
        return ["--range", f"{rank + 1}/2", "-o", f"{rank}.safetensors"]

    refused(2, "put WORLD_SIZE=1 before `deme`", *WORDS, *ENDLESS, by_rank=own_range)
    refused(2, "--jobs 2 starts processes", *WORDS, "--jobs", "2")
    refused(3, "nowhere", *WORDS, "--data", "nowhere")
    assert [path.name for path in folder.iterdir()] == ["base.safetensors"]


@pytest.mark.slow
def test_torchrun_passes_on_a_signal_and_the_state_is_saved_once(folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "--standalone", "-m", "deme_cli", *WORDS, *ENDLESS],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (folder / ".ft_1of2.checkpoint").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert output == ""
    assert errors.count("deme: stopped at update") == 1, errors
    assert (folder / ".ft_1of2.checkpoint").exists()
    assert not (folder / ".ft_1of2.metrics.jsonl.lock").exists()


LITTLE_MEMORY = """
import os, torch
from diffusers import UNet2DModel
from deme_cli.__main__ import main

forward, passes = UNet2DModel.forward, 0

def with_little_memory(self, *args, **options):
    global passes
    output = forward(self, *args, **options)
    passes += torch.is_grad_enabled()
    if passes == 3 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return output

UNet2DModel.forward = with_little_memory
main()
"""


@pytest.mark.slow
def test_a_lack_of_memory_ends_those_that_share_a_network_with_one_line(folder: Path) -> None:
    (folder / "program.py").write_text(LITTLE_MEMORY)
    settings = ["--batch-size", "6", "--held-out", "0", "--steps", "9", "--consistency", "0"]
    program = [str(folder / "program.py")]
    codes, said = ends(launch(folder, *WORDS, *settings, "--shard", program=program))
    assert (codes, len(said)) == ([3, 3], 1), said
    assert "does not fit into the device's memory with 3 images at a time" in said[0]
