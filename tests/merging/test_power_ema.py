from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deme_cli.artifacts import ExpertRecord
from deme_cli.errors import ConfigError
from deme_cli.merging.power_ema import (
    coefficients_for_length,
    inner_products,
    misfit,
    post_hoc_coefficients,
)
from deme_cli.training.power_profile import beta, gamma_of

SAVED = [(t, gamma_of(length)) for t in range(1000, 20001, 1000) for length in (0.05, 0.10)]


def record(step: int, length: float | None, **changed: object) -> ExpertRecord:
    """An expert of one run: the power-function EMA of a length, or the usual one."""
    averaging = {"ema_length": length, "ema_gamma": gamma_of(length)} if length else {}
    training = {"lr": 0.1, "held_out": 16, "step": step, **averaging}
    whole = ExpertRecord(
        source="tiny", model_config={}, scheduler_config={}, num_train_timesteps=100,
        range=[0, 25], index=1, of=4, base="b" * 64, p=0.3, steps=step, seed=0, projection="none",
        data={"fingerprint": "d"}, training=training,
    )  # fmt: skip
    return replace(whole, **changed)


def test_inner_products_are_the_integrals_of_two_profiles() -> None:
    pairs = [(1.0, 6.9), (0.4, 17.0), (0.7, 0.2)]
    tau = (np.arange(200_000) + 0.5) / 200_000
    profiles = [(g + 1) * tau**g / t ** (g + 1) * (tau <= t) for t, g in pairs]
    expected = [[(p * q).mean() for q in profiles] for p in profiles]
    np.testing.assert_allclose(inner_products(pairs, pairs), expected, rtol=1e-3)


def test_an_average_that_was_saved_gets_one_and_the_others_nothing() -> None:
    for index, length in ((38, 0.05), (39, 0.10)):
        expected = np.eye(len(SAVED))[index]
        found = post_hoc_coefficients(SAVED, 20_000, length)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert misfit(SAVED, found, 20_000, length) < 1e-6


def test_a_length_between_those_saved_is_met_closely_and_more_snapshots_meet_it_better() -> None:
    coarse = [snapshot for snapshot in SAVED if snapshot[0] % 4000 == 0]
    errors = []
    for snapshots in (coarse, SAVED):
        found = post_hoc_coefficients(snapshots, 20_000, 0.07)
        errors.append(misfit(snapshots, found, 20_000, 0.07))
        assert sum(found) == pytest.approx(1, abs=0.01)
    assert errors[1] < 0.003 < errors[0] < 0.05


def test_the_combination_is_the_average_of_the_iterates_that_was_not_kept() -> None:
    rng = np.random.default_rng(0)
    theta = np.cumsum(rng.normal(size=(2000, 5)), axis=0)  # a walk from 0, in float64

    def averages(gamma: float) -> list[np.ndarray]:
        kept, found = np.zeros(5), []
        for t, weights in enumerate(theta, start=1):
            kept = beta(t, gamma) * kept + (1 - beta(t, gamma)) * weights
            found.append(kept)
        return found

    saved = {gamma: averages(gamma) for gamma in (gamma_of(0.05), gamma_of(0.10))}
    snapshots = [(t, gamma) for t in range(100, 2001, 100) for gamma in saved]
    for length in (0.07, 0.15):
        w = post_hoc_coefficients(snapshots, 2000, length)
        combined = sum(w[i] * saved[gamma][t - 1] for i, (t, gamma) in enumerate(snapshots))
        expected = averages(gamma_of(length))[-1]
        assert np.abs(combined - expected).max() < 0.02 * np.abs(expected).max()


def test_the_coefficients_come_from_the_records_in_their_order() -> None:
    records = [record(t, length) for t in (100, 50) for length in (0.10, 0.05)]
    pairs = [(r.steps, r.training["ema_gamma"]) for r in records]
    expected = post_hoc_coefficients(pairs, 100, 0.07)
    assert coefficients_for_length(records, 0.07) == expected
    other = {**records[1].training, "held_out": 99}
    records[1] = replace(records[1], training=other)  # what leaves the weights alone may differ
    assert coefficients_for_length(records, 0.07) == expected
    assert coefficients_for_length(records, 0.10) == pytest.approx([1, 0, 0, 0], abs=1e-12)
    with pytest.raises(ConfigError, match="above 0, below"):
        coefficients_for_length(records, float("nan"))


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (record(50, 0.05, range=[25, 50]), "range is"),
        (record(50, 0.05, data={"fingerprint": "e"}), "data is"),
        (record(50, 0.05, training={"lr": 0.2, "ema_gamma": 17.0}), "lr is 0.1 and 0.2"),
        (record(50, None), "no power-function EMA"),
    ],
)
def test_experts_that_are_not_of_one_run_are_refused(other: ExpertRecord, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as error:
        coefficients_for_length([record(100, 0.05), other], 0.07)
    assert "\n" not in str(error.value)
