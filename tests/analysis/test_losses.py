"""Losses against the timestep: those of a plain loop, paired draws, honest intervals."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deme_cli.analysis.lineup import folder_models, line_up
from deme_cli.analysis.losses.measure import (
    LossAnalysis,
    Losses,
    fixed_draws,
    measure_losses,
    own_ranges,
)
from deme_cli.analysis.losses.picture import draw_losses
from deme_cli.analysis.unfinished import Step, unfinished_path
from deme_cli.analysis_config import LossConfig
from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.errors import ArtifactError, ConfigError, NumericsError, Stopped
from deme_cli.records import BaseRecord
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import PixelExamples

CONFIG = LossConfig(buckets=8, num=6, batch_size=4)
SPANS = [TimestepRange(a, a + 25) for a in (0, 25, 50, 75)]


@pytest.fixture
def analysis(finished_run: Path, tmp_path: Path) -> LossAnalysis:
    base = finished_run / "base.safetensors"
    entrants = line_up(folder_models(base))
    denoiser = load_denoiser(base)
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape, split="held-out"))
    return LossAnalysis(
        entrants, examples, denoiser.schedule, CONFIG, SPANS, "held-out", tmp_path / "losses.json"
    )


def finish(analysis: LossAnalysis, **options) -> Losses:
    *_, last = measure_losses(analysis, **options)
    assert isinstance(last, Losses)
    return last


def test_the_line_up_is_base_experts_and_their_ensemble(analysis: LossAnalysis) -> None:
    names = [entrant.name for entrant in analysis.entrants]
    assert names == ["base", *(f"ft_{i}of4" for i in range(1, 5)), "ensemble"]
    assert own_ranges(analysis.entrants) == SPANS
    assert [entrant.span for entrant in analysis.entrants] == [None, *SPANS, None]


def test_losses_are_those_of_a_plain_loop_over_the_draws(
    analysis: LossAnalysis, finished_run: Path
) -> None:
    found, draws = finish(analysis), fixed_draws(analysis)
    errors = {}
    for name in ("base", "ft_1of4", "ft_2of4"):
        network = load_denoiser(finished_run / f"{name}.safetensors").network
        rows = []
        for draw in range(len(draws.t)):
            x0, _ = analysis.examples.draw([int(draws.images[draw])], flip=None, generator=None)
            eps, t = draws.noise(torch.tensor([draw])), draws.t[draw : draw + 1]
            with torch.no_grad():
                said = predict(network, draws.schedule.add_noise(x0, eps, t), t)
            rows.append(float((said - eps).square().mean()))
        errors[name] = np.array(rows)
    base, first, second, ensemble = (found.curves[i] for i in (0, 1, 2, 5))
    assert base.losses == pytest.approx(errors["base"].reshape(8, 6).mean(1), rel=1e-5)
    assert second.losses == pytest.approx(errors["ft_2of4"].reshape(8, 6).mean(1), rel=1e-5)
    paired = (errors["ft_1of4"] - errors["base"]).reshape(8, 6)
    assert first.differences == pytest.approx(paired.mean(1), rel=1e-3, abs=1e-7)
    assert ensemble.losses[:4] == pytest.approx([*first.losses[:2], *second.losses[2:4]])
    assert ensemble.by_range[0] == first.by_range[0]
    assert first.overall.mean == pytest.approx(paired.mean(), rel=1e-3, abs=1e-8)
    assert first.by_range[1].mean == pytest.approx(paired[2:4].mean(), rel=1e-3, abs=1e-7)
    assert (base.overall.mean, *base.differences) == (0,) * 9


def test_draws_are_even_over_timesteps_and_images(analysis: LossAnalysis) -> None:
    draws = fixed_draws(analysis)
    for bucket, times in zip(analysis.buckets, draws.t.view(8, 6), strict=True):
        assert all(int(t) in bucket for t in times)
    assert len(set(draws.images.tolist())) == 48
    other = fixed_draws(replace(analysis, config=replace(CONFIG, batch_size=7)))
    assert torch.equal(draws.t, other.t)
    chosen = torch.tensor([3, 40])
    assert torch.equal(draws.noise(chosen)[1:], other.noise(chosen[1:]))


def test_a_resumed_run_equals_an_uninterrupted_one(analysis: LossAnalysis, tmp_path: Path) -> None:
    whole = finish(replace(analysis, output=tmp_path / "whole.json"))
    steps = measure_losses(analysis)
    while next(steps).done < 100:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped after"):
        next(steps)
    first, *_, again = measure_losses(analysis)
    assert first.done >= 100
    assert "continuing" in first.note
    for one, other in zip(whole.curves, again.curves, strict=True):
        assert np.array_equal(one.losses, other.losses)
        assert np.array_equal(one.differences, other.differences)
    other = next(measure_losses(replace(analysis, split="train")))
    assert other == Step(0, "what was measured before had another split; measuring all of it anew")
    unfinished_path(analysis.output).unlink()
    assert next(measure_losses(analysis)) == Step(0)


def test_wrong_ranges_and_broken_weights_are_told(
    analysis: LossAnalysis, finished_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="no expert covers"):
        finish(replace(analysis, ranges=SPANS[:2]))
    few = replace(CONFIG, buckets=1, num=1)
    with pytest.raises(ConfigError, match="no draw lies in range"):
        finish(replace(analysis, config=few))
    weights = load_tensors(finished_run / "base.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    record = analysis.entrants[0].records[0]
    assert isinstance(record, BaseRecord)
    write_artifact(tmp_path / "broken.safetensors", weights, record)
    with pytest.raises(NumericsError, match="broken: the loss is not finite"):
        finish(replace(analysis, entrants=line_up([str(tmp_path / "broken.safetensors")])))


def test_the_picture_is_drawn_in_both_formats(analysis: LossAnalysis) -> None:
    png, svg = draw_losses(finish(analysis), title="a file called $^$", foot="f")
    assert png.startswith(b"\x89PNG")
    assert b"ft_1of4, 0:25" in svg
