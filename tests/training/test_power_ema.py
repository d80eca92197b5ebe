from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deme_cli.artifacts import load_tensors, read_record
from deme_cli.config import FinetuneConfig
from deme_cli.errors import ConfigError
from deme_cli.merging.power_ema import coefficients_for_length
from deme_cli.training.power_profile import beta, gamma_of
from deme_cli.training.setup import Run, checkpoint_path, variant_path, variant_paths
from deme_cli.training.state import require_same_run
from deme_cli.training.train import train

PLAIN = FinetuneConfig(steps=12, batch_size=4, lr=1e-3, checkpoint_every=100, held_out=0)
SAVING = replace(PLAIN, ema_lengths=[0.05, 0.1], snapshot_every=4)
EVERY = replace(
    PLAIN, projection="none", ema_decay=0.0, ema_lengths=[0.05, 0.1, 0.15], snapshot_every=1
)


@pytest.fixture(scope="module")
def iterates(digits_run: Callable[..., Run]) -> Run:
    """A finished run that wrote its very weights after every update, and three averages."""
    run = digits_run(EVERY)
    list(train(run))
    return run


def files_of(run: Run) -> list[Path]:
    return [run.output, *variant_paths(run.output, run.config)]


def flat(path: Path) -> torch.Tensor:
    """All weights of an artifact in one float64 row."""
    tensors = load_tensors(path)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_gamma_is_that_of_the_paper_and_has_the_length_asked_for() -> None:
    for sigma_rel, gamma in [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)]:
        found = gamma_of(sigma_rel)
        assert found == pytest.approx(gamma, abs=0.005)
        length = ((found + 1) / (found + 3)) ** 0.5 / (found + 2)
        assert length == pytest.approx(sigma_rel, rel=1e-14)
    assert 0 < gamma_of(0.2886) < 0.01  # all but the plain mean
    for wrong in (0.0, 12**-0.5):
        with pytest.raises(ConfigError, match="above 0, below"):
            gamma_of(wrong)


def test_the_first_update_forgets_the_start_and_gamma_0_is_the_plain_mean() -> None:
    assert beta(1, 5.0) == 0
    assert beta(4, 0.0) == 0.75


def test_the_running_average_is_the_sum_of_the_iterates_under_its_profile(iterates: Run) -> None:
    steps = EVERY.steps
    theta = [flat(variant_path(iterates.output, step=step)) for step in range(1, steps)]
    theta.append(flat(iterates.output))
    for t in (1, 5, steps):
        for length in EVERY.ema_lengths:
            power = gamma_of(length) + 1
            masses = [(tau**power - (tau - 1) ** power) / t**power for tau in range(1, t + 1)]
            expected = sum(mass * weights for mass, weights in zip(masses, theta, strict=False))
            step = t if t < steps else None
            kept = flat(variant_path(iterates.output, step=step, length=length))
            assert (kept - expected).abs().max() < 1e-6  # float32 by float64


def test_a_length_that_was_not_saved_is_mixed_from_those_that_were(iterates: Run) -> None:
    files = [
        variant_path(iterates.output, step=step, length=length)
        for step in (2, 4, 6, 8, 10, None)
        for length in (0.05, 0.15)
    ]
    w = coefficients_for_length([read_record(path, "expert") for path in files], 0.1)
    base = iterates.denoiser.network.state_dict()
    theta = torch.cat([base[name].double().flatten() for name in sorted(base)])
    mixed = theta + sum(w_i * (flat(path) - theta) for w_i, path in zip(w, files, strict=True))
    kept = flat(variant_path(iterates.output, length=0.1))
    assert (mixed - kept).norm() < 0.005 * (kept - theta).norm()


def test_a_resumed_run_writes_the_same_files_which_say_what_they_are(
    digits_run: Callable[..., Run],
) -> None:
    plain, whole, broken = digits_run(PLAIN), digits_run(SAVING), digits_run(SAVING)
    list(train(plain))
    list(train(whole))
    for record in train(broken):  # broken off at a state that is saved, before what comes after
        if record.step >= 8:
            break
    assert checkpoint_path(broken.output).exists()
    assert not variant_path(broken.output, length=0.1).exists()
    list(train(broken))
    for one, other in zip(files_of(whole), files_of(broken), strict=True):
        assert read_record(one) == read_record(other)
    assert not checkpoint_path(broken.output).exists()

    record = read_record(plain.output)
    assert record.fingerprint == read_record(whole.output).fingerprint
    assert not {"ema_lengths", "snapshot_every", "step"} & set(record.training)
    names = {path.name for path in (whole.output.parent / "ft_2of4.snapshots").iterdir()}
    assert names == {
        "ema-0.050.safetensors", "ema-0.100.safetensors",
        *(f"step-{step}.safetensors" for step in ("000004", "000008")),
        *(f"step-{step}.ema-{s}.safetensors"
          for step in ("000004", "000008") for s in ("0.050", "0.100")),
    }  # fmt: skip
    record = read_record(variant_path(whole.output, step=4, length=0.05), "expert")
    assert (record.steps, record.training["step"], record.training["steps"]) == (4, 4, 12)
    assert record.training["ema_length"] == 0.05
    assert record.training["ema_gamma"] == gamma_of(0.05)
    folded = set(load_tensors(variant_path(whole.output, length=0.1)))
    assert folded == set(whole.denoiser.network.state_dict())

    shorter = digits_run(replace(SAVING, steps=8, snapshot_every=None))  # what a snapshot is
    list(train(shorter))
    for length in (None, 0.05):
        one = read_record(variant_path(whole.output, step=8, length=length))
        other = read_record(variant_path(shorter.output, length=length))
        assert one.fingerprint == other.fingerprint


def test_a_run_kept_before_there_were_these_settings_still_continues(
    digits_run: Callable[..., Run],
) -> None:
    run = digits_run(PLAIN)
    before = {k: v for k, v in run.identity.items() if k not in ("ema_lengths", "snapshot_every")}
    require_same_run(before, run.identity, run.output)
    with pytest.raises(ConfigError, match="ema_lengths = None"):
        require_same_run(before, digits_run(SAVING).identity, run.output)
    with pytest.raises(ConfigError, match="on other images or captions"):
        require_same_run({**before, "data": "0"}, run.identity, run.output)


def test_a_length_of_more_digits_has_a_name_of_its_own() -> None:
    names = [variant_path(Path("x.safetensors"), length=s).name for s in (0.05, 0.0501)]
    assert names == ["ema-0.050.safetensors", "ema-0.0501.safetensors"]
