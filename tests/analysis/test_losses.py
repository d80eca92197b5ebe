"""Losses against the timestep: those of a plain loop, paired draws, resumed as never stopped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deme_cli.analysis.draws import spread_draws
from deme_cli.analysis.losses import analyze_losses
from deme_cli.analysis.settings import LossConfig
from deme_cli.config import DataConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.timesteps import split_uniform
from deme_cli.training.examples import PixelExamples

CONFIG = LossConfig(buckets=8, num=3, batch_size=4)
analyze = partial(analyze_losses, settings=CONFIG, images=DataConfig(source="digits"))


def test_losses_are_those_of_a_plain_loop_over_the_draws(run_folder: Path, resumed: Any) -> None:
    made = resumed(analyze, 50)
    assert made.document == analyze(output=Path("whole.json")).document
    assert not list(Path().glob(".losses*"))
    rows = {row["name"]: row for row in made.document["models"]}
    assert list(rows) == ["base", *(f"ft_{i}of4" for i in range(1, 5)), "ensemble"]
    assert made.document["ranges"] == ["0:25", "25:50", "50:75", "75:100"]
    denoiser = load_denoiser(Path("base.safetensors"))
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape, split="held-out"))
    draws = spread_draws(examples, denoiser.schedule, split_uniform(8, 100), CONFIG)
    errors = {}
    for name in ("base", "ft_1of4", "ft_2of4"):
        network = load_denoiser(Path(f"{name}.safetensors")).network
        own = []
        for draw in range(len(draws.t)):
            x0, _ = examples.draw([int(draws.images[draw])], flip=None, generator=None)
            eps, t = draws.noise(torch.tensor([draw])), draws.t[draw : draw + 1]
            with torch.no_grad():
                said = predict(network, draws.schedule.add_noise(x0, eps, t), t)
            own.append(float((said - eps).square().mean()))
        errors[name] = np.array(own)
        assert rows[name]["losses"] == pytest.approx(errors[name].reshape(8, 3).mean(1), rel=1e-5)
    first, ensemble = rows["ft_1of4"], rows["ensemble"]
    paired = (errors["ft_1of4"] - errors["base"]).reshape(8, 3)
    assert first["differences"] == pytest.approx(paired.mean(1), rel=1e-3, abs=1e-7)
    assert first["difference"]["mean"] == pytest.approx(paired.mean(), rel=1e-3, abs=1e-8)
    in_second = first["difference_by_range"][1]["mean"]
    assert in_second == pytest.approx(paired[2:4].mean(), rel=1e-3, abs=1e-7)
    own = [*first["losses"][:2], *rows["ft_2of4"]["losses"][2:4]]
    assert ensemble["losses"][:4] == pytest.approx(own)
    assert ensemble["difference_by_range"][0] == first["difference_by_range"][0]
    assert "difference" not in rows["base"]
    assert [row[0] for row in made.rows] == list(rows)


def test_broken_weights_and_ranges_without_draws_are_told(
    run_folder: Path, write_changed: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=r"timesteps .* have 0 of 1 draws; raise --num"):
        analyze(settings=LossConfig(buckets=1, num=1))
    write_changed("broken.safetensors", "base.safetensors", 1e25)
    with pytest.raises(NumericsError, match="broken: the loss is not finite"):
        analyze(["broken.safetensors"])
