"""T timesteps, B batch. A formula is proved against numpy's, an objective by its gradient."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from deme_cli.config import WEIGHTINGS
from deme_cli.diffusion.schedule import FlowSchedule, NoiseSchedule, Schedule, read_schedule
from deme_cli.errors import ConfigError
from deme_cli.training.weighting import loss_weights

LINEAR = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
ABAR = torch.tensor([0.9999, 0.97, 0.8, 0.5, 0.2, 0.01], dtype=torch.float64)
SIGMAS = torch.tensor([0.01, 0.2, 0.4, 0.5, 0.8, 0.999], dtype=torch.float64)
NAMES = [name for name in WEIGHTINGS if name not in ("none", "uncertainty")]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
X0_WEIGHTS = {  # REFERENCE section 2, the column of the x_0-loss: f(SNR, gamma, k)
    "uniform": lambda snr, gamma, k: snr,
    "snr+1": lambda snr, gamma, k: snr + 1,
    "truncated-snr": lambda snr, gamma, k: np.maximum(snr, 1),
    "min-snr": lambda snr, gamma, k: np.minimum(snr, gamma),
    "soft-min-snr": lambda snr, gamma, k: snr * gamma / (snr + gamma),
    "p2": lambda snr, gamma, k: snr / (k + snr) ** gamma,
}
OVER = {"epsilon": lambda snr: snr, "sample": np.ones_like, "v_prediction": lambda snr: snr + 1}


def linear(prediction_type: str = "epsilon") -> Schedule:
    return read_schedule({**LINEAR, "prediction_type": prediction_type})


@pytest.mark.parametrize(
    ("name", "mean", "share"),
    [
        ("snr+1", 1312, 0.983),
        ("truncated-snr", 1311, 0.983),
        ("min-snr", 0.913, 0.274),
        ("p2", 0.724, 0.345),
    ],
)
def test_mean_and_share_of_the_noisiest_quarter_are_the_published_ones(
    name: str, mean: float, share: float
) -> None:
    weights = loss_weights(linear(), name)
    assert weights.dtype == torch.float64
    assert weights.mean().item() == pytest.approx(mean, rel=1e-3)
    assert (weights[750:].sum() / weights.sum()).item() == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("gamma", "k"), [(None, 1.0), (0.5, 2.0), (3.0, 0.5)])
def test_every_weight_is_that_of_the_table(
    name: str, prediction_type: str, gamma: float | None, k: float
) -> None:
    schedule = linear(prediction_type)
    snr = schedule.snr.numpy()
    published = 1.0 if name == "p2" else 5.0
    expected = X0_WEIGHTS[name](snr, gamma or published, k) / OVER[prediction_type](snr)
    weights = loss_weights(schedule, name, gamma=gamma, k=k)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("prediction_type", "added"), [("epsilon", 0), ("v_prediction", 1)], ids=str
)
def test_min_snr_is_the_recipe_of_the_diffusers_scripts(prediction_type: str, added: int) -> None:
    scheduler = DDPMScheduler.from_config({**LINEAR, "prediction_type": prediction_type})
    oracle = compute_snr(scheduler, torch.arange(1000))
    expected = oracle.clamp(max=5.0) / (oracle + added)
    weights = loss_weights(linear(prediction_type), "min-snr", gamma=5.0)
    torch.testing.assert_close(weights.float(), expected, rtol=1e-5, atol=0)


def outputs(x0: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> SimpleNamespace:
    """The other readings of one prediction of x_0, where x_t = signal x_0 + noise eps."""
    eps = (x_t - signal * x0) / noise
    return SimpleNamespace(
        epsilon=eps, sample=x0, v_prediction=signal * eps - noise * x0, flow=eps - x0
    )


def weighted_gradient(schedule: Schedule, name: str, signal: Tensor, noise: Tensor) -> Tensor:
    """d/d theta of mean_t w(t) ||target - output||^2 of one small network that predicts x_0."""
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    x0, eps = torch.randn(len(signal), 3, **draw), torch.randn(len(signal), 3, **draw)
    theta = nn.Parameter(torch.randn(3, 3, **draw))

    t = torch.arange(len(signal))
    signal, noise = signal[:, None], noise[:, None]
    features = signal * x0 + noise * eps  # the same network input whatever the target
    read = outputs(torch.tanh(features @ theta), features, signal, noise)
    error = schedule.target(x0, eps, t) - getattr(read, schedule.prediction_type)
    loss = (loss_weights(schedule, name) * error.square().mean(1)).mean()
    return torch.autograd.grad(loss, theta)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_objective_is_the_same_whatever_the_network_predicts(
    name: str, prediction_type: str
) -> None:
    signal, noise = ABAR.sqrt(), (1 - ABAR).sqrt()
    gradient = weighted_gradient(NoiseSchedule(ABAR, prediction_type), name, signal, noise)
    expected = weighted_gradient(NoiseSchedule(ABAR, "sample"), name, signal, noise)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_objective_of_a_flow_velocity_is_that_of_its_clean_image(name: str) -> None:
    signal, noise = 1 - SIGMAS, SIGMAS
    abar = signal.square() / (signal.square() + noise.square())  # the abar of the same SNR
    gradient = weighted_gradient(FlowSchedule(SIGMAS), name, signal, noise)
    expected = weighted_gradient(NoiseSchedule(abar, "sample"), name, signal, noise)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["none", "uncertainty"])
def test_the_plain_loss_and_the_learned_weights_have_no_table(name: str) -> None:
    assert loss_weights(linear(), name) is None


@pytest.mark.parametrize("name", NAMES)
def test_normalised_weights_have_mean_one_and_the_old_proportions(name: str) -> None:
    plain, scaled = (loss_weights(linear(), name, normalise=flag) for flag in (False, True))
    assert scaled.mean().item() == pytest.approx(1)
    torch.testing.assert_close(scaled * plain.mean(), plain)


def with_zero_terminal_snr(prediction_type: str) -> Schedule:
    scheduler = {**LINEAR, "rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    return read_schedule(scheduler)


@pytest.mark.parametrize("name", ["snr+1", "truncated-snr"])
def test_noise_cannot_be_weighed_where_there_is_no_signal(name: str) -> None:
    with pytest.raises(ConfigError, match="no finite weight") as caught:
        loss_weights(with_zero_terminal_snr("epsilon"), name)
    for word in (f"= {name}:", "t = 999", "ratio is 0", "epsilon", "min-snr", "predicts v"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("uniform", 1.0), ("min-snr", 1.0), ("soft-min-snr", 1.0), ("p2", 2.0**-3)],
)
def test_weights_on_noise_have_their_limit_where_there_is_no_signal(
    name: str, expected: float
) -> None:
    gamma = 3.0 if name == "p2" else None
    weights = loss_weights(with_zero_terminal_snr("epsilon"), name, gamma=gamma, k=2.0)
    assert weights[-1].item() == pytest.approx(expected)


PURE_NOISE = {"snr+1": 1.0, "truncated-snr": 1.0}  # w_x0 at SNR 0; the others end at 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "schedule",
    [
        with_zero_terminal_snr("sample"),
        with_zero_terminal_snr("v_prediction"),
        FlowSchedule(torch.linspace(0.001, 1, 1000, dtype=torch.float64)),
    ],
    ids=lambda schedule: schedule.prediction_type,
)
def test_other_targets_can_be_weighed_in_pure_noise(name: str, schedule: Schedule) -> None:
    weights = loss_weights(schedule, name)
    assert weights.isfinite().all()
    assert weights[-1].item() == PURE_NOISE.get(name, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_velocity_can_be_weighed_without_noise(name: str) -> None:
    abar, sigmas = torch.cat([torch.ones(1), ABAR]), torch.cat([torch.zeros(1), SIGMAS])
    for schedule in (NoiseSchedule(abar, "v_prediction"), FlowSchedule(sigmas)):
        weights = loss_weights(schedule, name, gamma=0.5)
        assert weights.isfinite().all()
        assert weights[0].item() == (1.0 if name in ("uniform", "snr+1", "truncated-snr") else 0.0)


@pytest.mark.parametrize("name", ["min-snr", "soft-min-snr"])
def test_bounded_weights_of_a_clean_image_reach_gamma_without_noise(name: str) -> None:
    schedule = NoiseSchedule(torch.cat([torch.ones(1), ABAR]), "sample")
    assert loss_weights(schedule, name)[0].item() == 5.0


def test_a_clean_image_cannot_be_weighed_evenly_on_its_noise_where_there_is_none() -> None:
    schedule = NoiseSchedule(torch.cat([torch.ones(1), ABAR]), "sample")
    with pytest.raises(ConfigError, match=r"uniform: .* t = 0, .* ratio is inf"):
        loss_weights(schedule, "uniform")
