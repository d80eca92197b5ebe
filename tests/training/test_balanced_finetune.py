"""Runs of every loss weighting and every balance of clusters: averages, stops, rates, clipping."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deme_cli.artifacts import load_tensors, read_record
from deme_cli.config import MULTITASK, WEIGHTINGS, FinetuneConfig
from deme_cli.errors import ConfigError, Stopped
from deme_cli.files import read_header
from deme_cli.timesteps import TimestepRange
from deme_cli.training.setup import Run, checkpoint_path
from deme_cli.training.state import TrainingState, learning_rate
from deme_cli.training.train import train
from deme_cli.training.weighting import Reduction

CLUSTERS = [TimestepRange(0, 20), TimestepRange(20, 50)]
QUICK = FinetuneConfig(
    steps=3, batch_size=4, lr=1e-3, checkpoint_every=100, held_out=0, p=0.0, projection="none",
    clusters=2, multitask_every=2,
)  # fmt: skip
BRANCHES = {name: {"loss_weighting": name} for name in WEIGHTINGS}
BRANCHES |= {method: {"multitask": method} for method in MULTITASK if method != "none"}
BRANCHES["min-snr uw"] = {"loss_weighting": "min-snr", "multitask": "uw"}


@pytest.fixture(scope="module")
def run_of(digits_run: Callable[..., Run]) -> Callable[..., Run]:
    """A run of QUICK with other settings."""

    def make(**settings: object) -> Run:
        config = replace(QUICK, **settings)
        return digits_run(config, "1/2", clusters=CLUSTERS if config.multitask != "none" else ())

    return make


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All weights in one float64 row."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_every_branch_trains_to_weights_of_its_own(run_of: Callable[..., Run]) -> None:
    ends = {}
    for branch, settings in BRANCHES.items():
        run = run_of(**settings)
        list(train(run))
        ends[branch] = flat(load_tensors(run.output))
    # the base predicts the noise, on which the plain loss is uniform
    assert torch.equal(ends.pop("uniform"), ends["none"])
    names = list(ends)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert (ends[one] - ends[other]).abs().max() > 1e-5, (one, other)


UNCERTAINTY = {"loss_weighting": "uncertainty"}
TO_BE_STOPPED = {
    # alpha is solved at the updates from 0, 4 and 8; the run is stopped before that from 6
    "steps": 10, "checkpoint_every": 3, "multitask_every": 4,
    "lr_schedule": "cosine", "warmup": 3,
}  # fmt: skip


def train_and_read(run: Run, step: int) -> dict[str, Tensor]:
    """Train to the end; returns all that the checkpoint of update `step` holds."""
    kept = {}
    for record in train(run):
        if record.step == step:
            kept = {n: v.clone() for n, v in load_tensors(checkpoint_path(run.output)).items()}
    return kept


def train_and_stop(run: Run, step: int) -> None:
    """Train, and send this process a SIGTERM after update `step`."""
    records = train(run)
    while next(records).step < step:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        next(records)


@pytest.mark.parametrize(
    ("settings", "learned", "at_first"),
    [
        (UNCERTAINTY, "reduction.uncertainty.weight", 0),
        ({"multitask": "nashmtl", "accumulation": 2}, "reduction.tasks.alpha", 1),
        ({"multitask": "uw"}, "reduction.tasks.log_variances", 0),
    ],
)
def test_a_stopped_run_continues_bit_for_bit_its_learned_weights_included(
    run_of: Callable[..., Run], settings: dict, learned: str, at_first: int
) -> None:
    whole, stopped = (run_of(**TO_BE_STOPPED, **settings) for _ in range(2))
    expected = train_and_read(whole, 9)
    train_and_stop(stopped, 6)
    checkpoint = checkpoint_path(stopped.output)
    assert json.loads(read_header(checkpoint).metadata["deme"])["step"] == 6
    assert (load_tensors(checkpoint)[learned] != at_first).any(), "something has been learned"
    found = train_and_read(stopped, 9)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert read_record(stopped.output, "expert") == read_record(whole.output, "expert")


def test_a_kept_run_is_not_continued_in_other_clusters(run_of: Callable[..., Run]) -> None:
    run = run_of(multitask="uw", checkpoint_every=1)
    next(train(run))
    moved = replace(run, clusters=[TimestepRange(0, 30), TimestepRange(30, 50)])
    with pytest.raises(ConfigError, match="0:20"):
        list(train(moved))


def state_of(run: Run, *, scale_loss: bool = False) -> TrainingState:
    network = copy.deepcopy(run.denoiser.network).train().requires_grad_(True)
    reduction = Reduction(run.config, run.denoiser.schedule, run.clusters)
    return TrainingState(network, reduction, run.config, scale_loss=scale_loss)


def give_gradients(state: TrainingState, network: float, own: float) -> None:
    """The same number as every gradient of the network, another as that of what is learned."""
    for module, value in ((state.network, network), (state.reduction, own)):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, value)


FALLING = {"lr_schedule": "cosine", "warmup": 2, "steps": 6, "weight_decay": 0.5}


def test_uw_learns_at_a_rate_of_its_own_while_that_of_the_network_falls(
    run_of: Callable[..., Run],
) -> None:
    multitask_lr = 0.5
    state = state_of(run_of(multitask="uw", multitask_lr=multitask_lr, **FALLING))
    s = state.reduction.tasks.log_variances
    rates = []
    for _ in range(6):
        before = s.detach().clone()
        give_gradients(state, network=1.0, own=3.0)
        state.update()
        network, own = state.optimizer.param_groups
        rates.append(network["lr"])
        assert own["lr"] == multitask_lr
        # the step of Adam under a constant gradient is its rate
        torch.testing.assert_close(before - s, torch.full((2,), multitask_lr), rtol=1e-4, atol=0)
    assert rates == [learning_rate(step, state.config) for step in range(6)]
    assert rates[0] < rates[2] == QUICK.lr > rates[5]


def test_weight_decay_shrinks_the_network_and_leaves_what_is_learned(
    run_of: Callable[..., Run],
) -> None:
    state = state_of(run_of(**UNCERTAINTY, **FALLING))
    for parameter in state.reduction.parameters():
        parameter.data.fill_(1.5)
    before = flat(state.network.state_dict())
    kept = 1.0
    for step in range(6):
        give_gradients(state, network=0.0, own=0.0)
        state.update()
        kept *= 1 - 0.5 * learning_rate(step, state.config)
    torch.testing.assert_close(flat(state.network.state_dict()), before * kept)
    for parameter in state.reduction.parameters():
        assert (parameter == 1.5).all()


@pytest.mark.parametrize(
    ("settings", "scale_loss"), [({"multitask": "uw"}, False), (UNCERTAINTY, True)]
)
def test_the_gradient_of_the_network_alone_is_clipped(
    run_of: Callable[..., Run], settings: dict, scale_loss: bool
) -> None:
    run = run_of(**settings, grad_clip=0.5)
    for size in (0.2, 7.0):  # norms below and above the clip
        state = state_of(run, scale_loss=scale_loss)
        factor = float(state.scaler.scale(torch.ones(())))
        num = sum(parameter.numel() for parameter in state.network.parameters())
        give_gradients(state, network=size / num**0.5 * factor, own=100.0 * factor)
        state.update()

        def gradient(module: torch.nn.Module, state: TrainingState = state) -> Tensor:
            """What AdamW saw: its first moment after one update is (1 - beta1) of it."""
            moments = [state.optimizer.state[p]["exp_avg"].flatten() for p in module.parameters()]
            return torch.cat(moments) / (1 - state.config.beta1)

        norm = gradient(state.network).norm().item()
        assert norm == pytest.approx(min(size, 0.5), rel=1e-3)
        own = gradient(state.reduction)
        torch.testing.assert_close(own, torch.full_like(own, 100.0))


def test_an_overflow_of_fp16_skips_the_update_of_what_is_learned_too(
    run_of: Callable[..., Run],
) -> None:
    state = state_of(run_of(multitask="uw"), scale_loss=True)
    factor = float(state.scaler.scale(torch.ones(())))
    before = flat(state.network.state_dict())
    give_gradients(state, network=float("inf"), own=1.0)
    state.update()
    assert torch.equal(flat(state.network.state_dict()), before)
    assert state.reduction.tasks.log_variances.tolist() == [0, 0]
    assert state.scaler.get_scale() < factor
