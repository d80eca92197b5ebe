"""Batches that go through the network in parts: the same gradient, and what a lack of memory does.

No tiny network needs more memory than there is: one that refuses large batches stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from deme_cli.artifacts import load_tensors
from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ConfigError, MissingError
from deme_cli.timesteps import TimestepRange
from deme_cli.training.batches import open_batches
from deme_cli.training.setup import Run
from deme_cli.training.state import open_networks, open_state
from deme_cli.training.train import Gradients, train

CONFIG = FinetuneConfig(
    steps=3, batch_size=10, accumulation=2, lr=1e-3, checkpoint_every=100, held_out=0
)
OUT_OF_MEMORY = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.fixture(scope="module")
def run(digits_run: Callable[..., Run]) -> Run:
    return digits_run(CONFIG)


def update_of(run: Run, world: World = ALONE, **settings: object) -> tuple[list[Tensor], Tensor]:
    """The gradients of the first update of a run with other settings, and its batches' losses."""
    run = replace(run, config=replace(run.config, **settings))
    state = open_state(run, world)
    with open_batches(run, world, state.device) as draw:
        losses = Gradients(run, state, draw, world).of_update()
    return [p.grad for p in state.trained().values()], torch.stack(losses)


def require_same(found: tuple[list[Tensor], Tensor], wanted: tuple[list[Tensor], Tensor]) -> None:
    scale = max(float(gradient.abs().max()) for gradient in wanted[0])
    for one, two in zip(found[0], wanted[0], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=1e-7)


def test_parts_of_a_batch_have_the_gradient_and_the_losses_of_the_whole(run: Run) -> None:
    for micro_batch, settings in (
        (3, {"loss_weighting": "p2", "consistency": 0.0}),
        (4, {"loss_weighting": "uncertainty"}),
    ):
        found = update_of(run, micro_batch=micro_batch, **settings)
        require_same(found, update_of(run, **settings))
    found, whole = update_of(run, gradient_checkpointing=True)[0], update_of(run)[0]
    assert all(map(torch.equal, found, whole))  # activations are computed again, bit for bit


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let UNets that get gradients take so many images at most; the numbers that were tried."""
    forward = UNet2DModel.forward

    def limit(num: int, text: str = OUT_OF_MEMORY) -> list[int]:
        tried: list[int] = []

        def with_limit(self: nn.Module, sample: Tensor, *args: object, **kwargs: object) -> object:
            output = forward(self, sample, *args, **kwargs)
            if torch.is_grad_enabled():
                tried.append(len(sample))
                if len(sample) > num:
                    raise RuntimeError(text)
            return output

        monkeypatch.setattr(UNet2DModel, "forward", with_limit)
        return tried

    return limit


def test_where_memory_runs_out_parts_are_halved_and_the_expert_is_the_same(
    run: Run, most: Callable[[int], list[int]]
) -> None:
    list(train(run))
    wanted = load_tensors(run.output)
    run.output.unlink()
    tried = most(3)
    (record,) = train(run)
    assert tried == [10, 5, *[2, 3, 2, 3] * 2 * CONFIG.steps]
    assert record.halved_to == 3
    for name, tensor in load_tensors(run.output).items():
        if not name.endswith("to_k.bias"):  # see test_data_parallel.py
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-5)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A quarter of a GiB on a GPU, beside what is taken."""
    room = torch.cuda.memory_reserved() + (1 << 28)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_a_batch_that_a_gpu_has_no_memory_for_goes_in_parts(
    run: Run, digits_base: Path, little_memory: None
) -> None:
    denoiser = load_denoiser(digits_base, device="cuda")
    config = replace(CONFIG, batch_size=1 << 14, accumulation=1, steps=1)
    (record,) = train(replace(run, denoiser=denoiser, config=config))
    assert 1 < record.halved_to < 1 << 14


def test_a_lack_of_memory_that_parts_do_not_help_is_told_and_other_errors_are_as_they_are(
    run: Run, most: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = most(3, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.")
    with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
        update_of(run)
    assert tried == [10]
    most(0)
    with pytest.raises(MissingError, match="with 1 images at a time; use --gradient-checkp"):
        update_of(run)
    clusters = [TimestepRange(25, 40), TimestepRange(40, 50)]  # whole batches are balanced
    with pytest.raises(MissingError, match=r"with 10 images .*--multitask: --batch-size"):
        update_of(replace(run, clusters=clusters), multitask="uw", clusters=2, p=0.0)

    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 7.23 GB, max allowed: 9 GB)")

    most(10)
    monkeypatch.setattr(torch.optim.AdamW, "step", refuse)
    with pytest.raises(MissingError, match=r"moments and averages .*memory; use fewer --ema"):
        list(train(run))


def test_unequal_shares_in_parts_add_up_to_the_whole(
    run: Run, most: Callable[[int], list[int]]
) -> None:
    settings = {"batch_size": 5, "accumulation": 1}
    wanted = update_of(run, **settings)
    tried = most(1)
    parts = [update_of(run, World(rank, 2), micro_batch=1, **settings) for rank in (0, 1)]
    assert tried == [1] * 5
    summed = [one + other for one, other in zip(parts[0][0], parts[1][0], strict=True)]
    require_same((summed, parts[0][1] + parts[1][1]), wanted)


def test_a_network_without_gradient_checkpointing_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(run.denoiser.network), "_supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="UNet2DModel does not support it"):
        open_networks(replace(run, config=replace(CONFIG, gradient_checkpointing=True)))
