"""Mean gradients per bucket of timesteps: those of autograd, resumed as if never stopped."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from deme_cli.analysis.gradients import measure as analysis_module
from deme_cli.analysis.gradients import sketch as sketch_module
from deme_cli.analysis.gradients.measure import GradientAnalysis, _draws, measure_gradients
from deme_cli.analysis.unfinished import Step, unfinished_path
from deme_cli.analysis_config import GradientConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.errors import NumericsError, Stopped
from deme_cli.training.affinity import Affinity
from deme_cli.training.examples import PixelExamples

CONFIG = GradientConfig(buckets=5, num=12, batch_size=4)


@pytest.fixture
def analysis(finished_run: Path, tmp_path: Path) -> GradientAnalysis:
    denoiser = load_denoiser(finished_run / "base.safetensors")
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape))
    return GradientAnalysis(denoiser, examples, CONFIG, tmp_path / "gradients.json", "tiny", 2)


def finish(analysis: GradientAnalysis, **options) -> Affinity:
    *_, last = measure_gradients(analysis, **options)
    assert isinstance(last, Affinity)
    return last


def stop_in(analysis: GradientAnalysis, bucket: int) -> None:
    """Send SIGTERM once `bucket` buckets are done."""
    steps = measure_gradients(analysis)
    while next(steps).done < bucket * CONFIG.num:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match=f"after {bucket} of 5 buckets") as stopped:
        next(steps)
    assert stopped.value.exit_code == 75


def full_gradient(
    analysis: GradientAnalysis, index: int, halves: slice = slice(None)
) -> np.ndarray:
    """The gradient of the mean squared error over a bucket's draws, in one batch."""
    network, schedule = analysis.denoiser.network, analysis.denoiser.schedule
    losses, counts = [], []
    for part in _draws(analysis, index)[halves]:
        assert all(int(t) in analysis.buckets[index] for t in part.t)
        x0, _ = analysis.examples.draw(part.images.tolist(), flip=None, generator=None)
        eps = part.noise(torch.arange(len(part.t)))
        network.requires_grad_(True)
        output = predict(network, schedule.add_noise(x0, eps, part.t), part.t)
        losses.append(functional.mse_loss(output, eps))
        counts.append(len(eps))
    loss = sum(n * one for n, one in zip(counts, losses, strict=True)) / sum(counts)
    found = torch.autograd.grad(loss, list(network.parameters()))
    network.requires_grad_(False)
    return torch.cat([one.flatten() for one in found]).double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_cosines_norms_and_reliability_are_those_of_whole_gradients(
    analysis: GradientAnalysis,
) -> None:
    found = finish(analysis)
    whole = [full_gradient(analysis, index) for index in range(5)]
    expected = [[cosine(a, b) for b in whole] for a in whole]
    assert np.allclose(found.cosines, expected, atol=2e-5)
    assert found.norms == pytest.approx([np.linalg.norm(one) for one in whole], rel=1e-4)
    halves = [full_gradient(analysis, 3, slice(i, i + 1)) for i in (0, 1)]
    assert found.reliability[3] == pytest.approx(cosine(*halves), abs=2e-5)
    assert found.parameters == len(whole[0]) == found.sketch_size
    assert [str(span) for span in found.buckets] == ["0:20", "20:40", "40:60", "60:80", "80:100"]
    assert len(found.ranges) == 2


def test_a_sketched_analysis_is_within_its_stated_error(
    analysis: GradientAnalysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = finish(analysis)
    monkeypatch.setattr(
        analysis_module, "sketch_of", lambda network: sketch_module.sketch_of(network, 2048)
    )
    found = finish(analysis)
    assert found.standard_error == pytest.approx((2 / 2048) ** 0.5)
    assert np.abs(np.subtract(found.cosines, exact.cosines)).max() < 4 * found.standard_error
    assert found.norms == pytest.approx(exact.norms, rel=4 * found.standard_error)


def test_buckets_do_not_depend_on_each_other_or_on_the_batch_size(
    analysis: GradientAnalysis,
) -> None:
    found = finish(analysis)
    other = finish(replace(analysis, config=replace(CONFIG, batch_size=256)))
    assert np.allclose(found.cosines, other.cosines, atol=1e-5)
    draws = _draws(analysis, 4)[1]
    again = _draws(replace(analysis, config=replace(CONFIG, batch_size=3)), 4)[1]
    assert torch.equal(draws.t, again.t)
    assert torch.equal(draws.noise(torch.tensor([2])), again.noise(torch.tensor([1, 2]))[1:])
    assert not torch.equal(_draws(analysis, 3)[1].images, draws.images)


def test_a_resumed_analysis_equals_an_uninterrupted_one(
    analysis: GradientAnalysis, tmp_path: Path
) -> None:
    whole = finish(replace(analysis, output=tmp_path / "whole.json"))
    stop_in(analysis, 3)
    steps = list(measure_gradients(analysis))
    assert steps[0] == Step(3 * CONFIG.num, "continuing after 3 of 5 buckets")
    assert steps[-1] == whole
    assert steps[-2] == Step(5 * CONFIG.num)


def test_buckets_of_other_settings_are_not_used(analysis: GradientAnalysis) -> None:
    stop_in(analysis, 2)
    other = replace(analysis, config=replace(CONFIG, seed=1))
    first = next(measure_gradients(other))
    assert first.done == 0
    assert "had another seed; measuring all of it anew" in first.note
    kept = unfinished_path(analysis.output)
    kept.write_bytes(kept.read_bytes()[:-8])
    assert "cannot be read" in next(measure_gradients(analysis)).note
    steps = measure_gradients(analysis, force=True)
    assert next(steps) == Step(0)
    assert not kept.exists()


def test_a_gradient_that_is_not_finite_is_an_error(analysis: GradientAnalysis) -> None:
    next(analysis.denoiser.network.parameters()).data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="tiny: the gradient of timesteps 0:20 is not finite"):
        finish(analysis)
