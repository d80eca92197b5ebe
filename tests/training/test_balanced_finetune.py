"""One update of every loss weighting and every balance of clusters: rates, decay, clipping."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deme_cli.artifacts import load_tensors
from deme_cli.config import MULTITASK, WEIGHTINGS, FinetuneConfig
from deme_cli.timesteps import TimestepRange
from deme_cli.training.setup import Run
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
UNCERTAINTY = {"loss_weighting": "uncertainty"}
FALLING = {"lr_schedule": "cosine", "warmup": 2, "steps": 6, "weight_decay": 0.5}


@pytest.fixture(scope="module")
def run_of(digits_run: Callable[..., Run]) -> Callable[..., Run]:
    """A run of QUICK with other settings."""

    def make(**settings: object) -> Run:
        config = replace(QUICK, **settings)
        return digits_run(config, "1/2", clusters=CLUSTERS if config.multitask != "none" else ())

    return make


@pytest.fixture(scope="module")
def state_of(run_of: Callable[..., Run]) -> Callable[..., TrainingState]:
    def make(*, scale_loss: bool = False, **settings: object) -> TrainingState:
        run = run_of(**settings)
        network = copy.deepcopy(run.denoiser.network).train().requires_grad_(True)
        reduction = Reduction(run.config, run.denoiser.schedule, run.clusters)
        return TrainingState(network, reduction, run.config, scale_loss=scale_loss)

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


def give_gradients(state: TrainingState, network: float, own: float) -> None:
    """The same number as every gradient of the network, another as that of what is learned."""
    for module, value in ((state.network, network), (state.reduction, own)):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, value)


def test_uw_learns_at_a_rate_of_its_own_while_that_of_the_network_falls(
    state_of: Callable[..., TrainingState],
) -> None:
    state = state_of(multitask="uw", multitask_lr=0.5, **FALLING)
    s = state.reduction.tasks.log_variances
    rates = []
    for _ in range(6):
        before = s.detach().clone()
        give_gradients(state, network=1.0, own=3.0)
        state.update()
        network, own = state.optimizer.param_groups
        rates.append(network["lr"])
        assert own["lr"] == 0.5
        # the step of Adam under a constant gradient is its rate
        torch.testing.assert_close(before - s, torch.full((2,), 0.5), rtol=1e-4, atol=0)
    assert rates == [learning_rate(step, state.config) for step in range(6)]
    assert rates[0] < rates[2] == QUICK.lr > rates[5]


def test_weight_decay_shrinks_the_network_and_leaves_what_is_learned(
    state_of: Callable[..., TrainingState],
) -> None:
    state = state_of(**UNCERTAINTY, **FALLING)
    for parameter in state.reduction.parameters():
        parameter.data.fill_(1.5)
    before, kept = flat(state.network.state_dict()), 1.0
    for step in range(6):
        give_gradients(state, network=0.0, own=0.0)
        state.update()
        kept *= 1 - 0.5 * learning_rate(step, state.config)
    torch.testing.assert_close(flat(state.network.state_dict()), before * kept)
    assert all((parameter == 1.5).all() for parameter in state.reduction.parameters())


@pytest.mark.parametrize(
    ("settings", "scale_loss"), [({"multitask": "uw"}, False), (UNCERTAINTY, True)]
)
def test_the_gradient_of_the_network_alone_is_clipped(
    state_of: Callable[..., TrainingState], settings: dict, scale_loss: bool
) -> None:
    for size in (0.2, 7.0):  # norms below and above the clip
        state = state_of(**settings, grad_clip=0.5, scale_loss=scale_loss)
        factor = float(state.scaler.scale(torch.ones(())))
        num = sum(parameter.numel() for parameter in state.network.parameters())
        give_gradients(state, network=size / num**0.5 * factor, own=100.0 * factor)
        state.update()
        # what AdamW saw: its first moment after one update is (1 - beta1) of it
        network, own = (
            torch.cat([state.optimizer.state[p]["exp_avg"].flatten() for p in module.parameters()])
            / (1 - state.config.beta1)
            for module in (state.network, state.reduction)
        )
        assert network.norm().item() == pytest.approx(min(size, 0.5), rel=1e-3)
        torch.testing.assert_close(own, torch.full_like(own, 100.0))


def test_an_overflow_of_fp16_skips_the_update_of_what_is_learned_too(
    state_of: Callable[..., TrainingState],
) -> None:
    state = state_of(multitask="uw", scale_loss=True)
    factor = float(state.scaler.scale(torch.ones(())))
    before = flat(state.network.state_dict())
    give_gradients(state, network=float("inf"), own=1.0)
    state.update()
    assert torch.equal(flat(state.network.state_dict()), before)
    assert state.reduction.tasks.log_variances.tolist() == [0, 0]
    assert state.scaler.get_scale() < factor


def test_what_is_frozen_is_no_part_of_what_is_trained_kept_or_written(
    state_of: Callable[..., TrainingState], run_of: Callable[..., Run]
) -> None:
    state = state_of(ema_lengths=[0.1])
    names = {name for name, _ in state.network.named_parameters() if name.startswith("mid_block.")}
    for name, parameter in state.network.named_parameters():
        parameter.requires_grad_(name in names)
    run = run_of(ema_lengths=[0.1])
    state = TrainingState(state.network, state.reduction, run.config, scale_loss=False)
    before = {name: p.clone() for name, p in state.network.named_parameters()}
    for name in names:
        state.parameters[name].grad = torch.ones_like(before[name])
    state.update()
    moved = {n for n, p in state.network.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names == set(state.weights()) == set(state.weights(0.1)) == set(state.trained())
    path = run.output.with_name("checkpoint")
    state.save(path, run.identity)
    assert {name[name.index("mid_block.") :] for name in load_tensors(path)} == names
    state.restore(path, run.identity, run.output)
