"""What is counted of a run in advance, against a count of its updates themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import write_tiny_base
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deme_cli.comparison.passes import PassCost, count_passes, flops_per_update
from deme_cli.config import FinetuneConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.distributed import ALONE
from deme_cli.timesteps import TimestepRange, parse_range
from deme_cli.training.batches import open_batches
from deme_cli.training.examples import PixelExamples
from deme_cli.training.setup import Run
from deme_cli.training.state import open_state
from deme_cli.training.train import Gradients

CLUSTERS = [TimestepRange(0, 30), TimestepRange(30, 60), TimestepRange(60, 100)]
PLAIN = FinetuneConfig(
    batch_size=4, held_out=0, p=0.0, consistency=0.0, projection="none", clusters=3,
    multitask_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    folder = tmp_path_factory.mktemp("run")
    write_tiny_base(folder / "base.safetensors")
    denoiser = load_denoiser(folder / "base.safetensors")
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape))

    def make(**settings: object) -> Run:
        config = replace(PLAIN, **settings)
        return Run(
            denoiser, parse_range("1/1", 100), examples, None, flip=False, config=config,
            output=folder / "ft.safetensors",
            clusters=CLUSTERS if config.multitask != "none" else (),
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def passes() -> Callable[[Run], PassCost]:
    """The costs that are counted for a run, once for each placement of the projection."""
    made: dict[str, PassCost] = {}

    def cost(run: Run) -> PassCost:
        if run.config.projection not in made:
            made[run.config.projection] = count_passes(run)
        return made[run.config.projection]

    return cost


def count_updates(run: Run, num: int) -> int:
    """FLOPs of the first `num` updates of a run, less those of its Gram matrices."""
    config = run.config
    state, base = open_state(run, ALONE)
    measured = {"pcgrad": num * config.accumulation, "nashmtl": -(-num // config.multitask_every)}
    counter = FlopCounterMode(display=False)
    batches = open_batches(run, ALONE, state.device)
    with batches as source, sdpa_kernel(SDPBackend.MATH), counter:
        for _ in range(num):
            Gradients(run, state, base, source).of_update()
            state.update()
    size = sum(parameter.numel() for parameter in state.network.parameters())
    gram = 2 * len(run.clusters) ** 2 * size  # one matrix product of (k, size) with its transpose
    return counter.get_total_flops() - measured.get(config.multitask, 0) * gram


UPDATES = {
    "plain": {},
    "accumulation": {"consistency": 1.0, "accumulation": 2},
    "fold": {"projection": "fold"},
    "block": {"projection": "block", "consistency": 1.0},
    "uncertainty": {"loss_weighting": "uncertainty"},
    "uw": {"multitask": "uw"},
    "pcgrad": {"multitask": "pcgrad", "consistency": 1.0, "accumulation": 2},
    "nashmtl": {"multitask": "nashmtl", "consistency": 1.0, "accumulation": 2},
    "nashmtl, every": {"multitask": "nashmtl", "multitask_every": 1},
}


@pytest.mark.parametrize("settings", UPDATES.values(), ids=UPDATES)
def test_the_flops_of_an_update_are_those_of_updates_that_were_run(
    run_of: Callable[..., Run], passes: Callable[[Run], PassCost], settings: dict
) -> None:
    run = run_of(**settings)
    num = run.config.multitask_every if run.config.multitask == "nashmtl" else 1
    assert flops_per_update(run.config, passes(run)) == count_updates(run, num) / num


def test_projections_cost_more_in_the_network_and_nothing_in_the_base(
    run_of: Callable[..., Run], passes: Callable[[Run], PassCost]
) -> None:
    none, fold, block = (passes(run_of(projection=p)) for p in ("none", "fold", "block"))
    assert none.forward == none.base < fold.forward
    assert none.forward < block.forward
    assert none.backward < fold.backward
    assert none.base == fold.base == block.base


def test_a_base_from_scratch_has_no_frozen_copy(run_of: Callable[..., Run]) -> None:
    assert count_passes(replace(run_of(), from_scratch=True)).base == 0


def test_counting_leaves_the_model_as_it_was(run_of: Callable[..., Run]) -> None:
    run = run_of(consistency=1.0)
    network = run.denoiser.network
    before = copy.deepcopy(network.state_dict())
    count_passes(run)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_clusters_are_paid_for_in_backward_passes_alone() -> None:
    passes = PassCost(forward=10, backward=20, base=9)

    def cost(**settings: object) -> float:
        config = FinetuneConfig(batch_size=8, clusters=4, **settings)
        return flops_per_update(config, passes)

    assert cost() == 8 * (10 + 20 + 9)
    assert cost(consistency=0.0) == 8 * (10 + 20)
    assert cost(multitask="uw") == cost()
    assert cost(multitask="pcgrad") == 8 * (10 + 4 * 20 + 9)
    assert cost(multitask="nashmtl", multitask_every=1) == cost(multitask="pcgrad")
    assert cost(multitask="nashmtl") == pytest.approx(8 * (10 + 20 * (1 + 3 / 25) + 9))
    twice = cost(multitask="nashmtl", accumulation=2)  # the second batch is not measured
    assert twice == pytest.approx(8 * (2 * 10 + 20 * (2 + 3 / 25) + 2 * 9))
