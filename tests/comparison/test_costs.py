"""What is counted of a run in advance, against a count of its updates themselves."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_base
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deme_cli.comparison.plan import Plan, RowPlan
from deme_cli.comparison.stage import (
    PassCost,
    count_passes,
    flops_per_update,
    open_stage,
    passes_of,
)
from deme_cli.config import FinetuneConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.distributed import ALONE
from deme_cli.run_file import RunFile
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
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_tiny_base(path)
    return path


@pytest.fixture(scope="module")
def run_of(base: Path) -> Callable[..., Run]:
    denoiser = load_denoiser(base)
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape))

    def make(**settings: object) -> Run:
        config = replace(PLAIN, **settings)
        return Run(
            denoiser, parse_range("1/1", 100), examples, None, flip=False, config=config,
            output=base.with_name("ft.safetensors"),
            clusters=CLUSTERS if config.multitask != "none" else (),
        )  # fmt: skip

    return make


def count_updates(run: Run, num: int) -> int:
    """FLOPs of the first `num` updates of a run, less those of its Gram matrices."""
    config = run.config
    state = open_state(run, ALONE)
    measured = {"pcgrad": num * config.accumulation, "nashmtl": -(-num // config.multitask_every)}
    counter = FlopCounterMode(display=False)
    batches = open_batches(run, ALONE, state.device)
    with batches as draw, sdpa_kernel(SDPBackend.MATH), counter:
        for _ in range(num):
            Gradients(run, state, draw).of_update()
            state.update()
    size = sum(parameter.numel() for parameter in state.network.parameters())
    gram = 2 * len(run.clusters) ** 2 * size  # one matrix product of (k, size) with its transpose
    return counter.get_total_flops() - measured.get(config.multitask, 0) * gram


UPDATES = {
    "fold": {"projection": "fold", "consistency": 1.0, "accumulation": 2},
    "lora": {"lora": 2, "lora_targets": "all", "consistency": 1.0},
    "pcgrad": {"multitask": "pcgrad", "accumulation": 2},
    "nashmtl": {"multitask": "nashmtl", "consistency": 1.0, "accumulation": 2},
}


@pytest.mark.parametrize("settings", UPDATES.values(), ids=UPDATES)
def test_the_flops_of_an_update_are_those_of_updates_that_were_run(
    run_of: Callable[..., Run], settings: dict
) -> None:
    run = run_of(**settings)
    before = copy.deepcopy(run.denoiser.network.state_dict())
    num = run.config.multitask_every if run.config.multitask == "nashmtl" else 1
    assert flops_per_update(run.config, count_passes(run)) == count_updates(run, num) / num
    after = run.denoiser.network.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_base_from_scratch_has_no_frozen_copy(run_of: Callable[..., Run]) -> None:
    assert count_passes(replace(run_of(), from_scratch=True)).base == 0


def test_clusters_are_paid_for_in_backward_passes_alone() -> None:
    passes = PassCost(forward=10, backward=20, base=9)

    def cost(**settings: object) -> float:
        config = FinetuneConfig(batch_size=8, clusters=4, **settings)
        return flops_per_update(config, passes)

    assert cost() == 8 * (10 + 20 + 9)
    assert cost(consistency=0.0) == 8 * (10 + 20)
    assert cost(multitask="uw") == cost()
    assert cost(multitask="pcgrad") == 8 * (10 + 4 * 20 + 9)
    assert cost(multitask="nashmtl") == pytest.approx(8 * (10 + 20 * (1 + 3 / 25) + 9))
    twice = cost(multitask="nashmtl", accumulation=2)  # the second batch is not measured
    assert twice == pytest.approx(8 * (2 * 10 + 20 * (2 + 3 / 25) + 2 * 9))


PASSES = {
    "none": PassCost(forward=1000, backward=2000, base=1000),
    "fold": PassCost(forward=1100, backward=2200, base=1000),
    "block": PassCost(forward=1300, backward=2700, base=1000),
}
ROWS = (
    RowPlan("Before", "base"),
    RowPlan("Plain", "finetune"),
    RowPlan("Merged", "merged", 4),
    RowPlan("Bare", "ensemble", 8, finetune={"projection": "none", "consistency": 0.0}),
    RowPlan("Large batch", "finetune", finetune={"batch_size": 128, "accumulation": 2}),
    RowPlan("PCGrad", "finetune", finetune={"multitask": "pcgrad", "clusters": 3}),
    RowPlan("Block", "merged", 2, finetune={"projection": "block"}),
)


def test_equal_compute_is_that_of_plain_finetuning_within_one_update(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = "deme_cli.comparison.stage.passes_of"
    monkeypatch.setattr(passes, lambda stage, config: PASSES[config.projection])
    plan = Plan("All", ROWS, updates=1000, budget="compute", tables={"data": {"source": "digits"}})
    stage = open_stage(plan, RunFile(), tmp_path, base=base)
    assert stage.updates["Plain"] == 1000
    assert stage.flops(ROWS[1]) == 64 * 3000, "no consistency: the frozen base is not asked"
    assert stage.flops(ROWS[2]) == 64 * 4300
    for row in ROWS[1:]:
        spent = stage.updates[row.name] * stage.flops(row)
        assert abs(spent - 1000 * 64 * 3000) <= stage.flops(row), row.name
    assert len(set(stage.updates.values())) > 4


def test_passes_are_counted_once_and_again_for_another_base(base: Path, tmp_path: Path) -> None:
    plan = Plan("Two", ROWS[:2], tables={"data": {"source": "digits"}})
    stage = open_stage(plan, RunFile(), tmp_path, base=base)
    first = passes_of(stage, PLAIN)
    assert 0 < first.forward == first.base < first.backward
    kept = tmp_path / "passes.json"
    kept.write_text(kept.read_text().replace(f'"forward": {first.forward}', '"forward": 1'))
    assert passes_of(stage, PLAIN).forward == 1, "read, not counted"
    low = passes_of(stage, replace(PLAIN, lora=2, lora_targets="all"))
    assert low.forward > first.forward
    assert low.backward < first.backward, "the base is frozen"
    kept.write_text("{")
    other = replace(stage, record=replace(stage.record, fingerprint="e" * 64))
    assert passes_of(other, PLAIN) == first
    assert len(json.loads(kept.read_text())) == 1
