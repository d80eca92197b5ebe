"""Experts of latent models through `train`: every backbone, every projection, broken off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deme_cli.artifacts import load_tensors, read_record
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser, predict
from deme_cli.errors import ConfigError, MissingError
from deme_cli.timesteps import parse_range
from deme_cli.training.examples import open_examples
from deme_cli.training.setup import Run, metrics_path, random_denoiser
from deme_cli.training.train import train

SHORT = FinetuneConfig(
    steps=2, batch_size=3, lr=1e-3, checkpoint_every=2, held_out=3, caption_dropout=0.3
)


@pytest.fixture
def run_of(base: Callable[..., Denoiser], captioned: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run of a tiny pipeline's base; its cache lies beside the output."""

    def run(
        name: str, *, text: str = "1/2", cache: str = "auto", denoiser: Denoiser | None = None,
        **settings: object,
    ) -> Run:  # fmt: skip
        denoiser = denoiser or base(name)
        companions, config = open_companions(denoiser.record), replace(SHORT, **settings)
        images = DataConfig(source=str(captioned), resolution=16)
        train_images, held_out = (
            open_examples(images, companions, split=split, flips=flips, cache=cache,
                          beside=tmp_path)
            for split, flips in (("train", True), ("held-out", False))
        )  # fmt: skip
        choice = parse_range(text, denoiser.record.num_train_timesteps)
        output = tmp_path / f"ft_{choice.label}.safetensors"
        return Run(
            denoiser=denoiser, choice=choice, examples=train_images, held_out=held_out, flip=True,
            config=config, output=output,
        )  # fmt: skip

    return run


def curve(run: Run) -> list[float]:
    lines = metrics_path(run.output).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "sd3", "flux"])
def test_two_ranges_of_every_backbone_become_experts(
    run_of: Callable[..., Run], base: Callable[..., Denoiser], name: str
) -> None:
    record, moved = base(name).record, []
    for text in ("1/2", "2/2"):
        run = run_of(name, text=text)
        (last,) = train(run)
        assert last.loss > 0
        assert last.consistency > 0  # after the first update
        assert last.held_out is not None
        expert = read_record(run.output, "expert")
        assert expert.base == record.fingerprint != expert.fingerprint
        assert (expert.companions, expert.source) == (record.companions, record.source)
        assert expert.training["resolution"] == [16, 16]
        moved.append(load_tensors(run.output))
        x_t, conditions = run.examples.draw([0, 1], flip=None, generator=None)
        output = predict(load_denoiser(run.output).network, x_t, torch.tensor(700), conditions)
        assert output.isfinite().all()
    assert any(not torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


def test_a_resumed_run_on_latents_equals_an_uninterrupted_one_bit_for_bit(
    run_of: Callable[..., Run],
) -> None:
    settings = {"steps": 6, "checkpoint_every": 2, "accumulation": 2}  # of pixels: test_train.py
    whole = run_of("sd", **settings)
    list(train(whole))
    record, losses = read_record(whole.output, "expert"), curve(whole)
    whole.output.unlink()
    for step in train(run_of("sd", **settings)):
        if step.step == 4:
            break
    list(train(run_of("sd", **settings)))
    assert read_record(whole.output, "expert") == record
    assert curve(whole) == losses


def test_runs_with_and_without_a_cache_have_the_same_losses(run_of: Callable[..., Run]) -> None:
    losses = {}
    for cache in ("auto", "off"):
        run = run_of("sdxl", cache=cache, steps=4, checkpoint_every=1)
        losses[cache] = [
            value for step in train(run) for value in (step.loss, step.consistency, step.held_out)
        ]
    assert losses["auto"] == pytest.approx(losses["off"], rel=1e-6, abs=1e-6)


def test_a_base_of_ones_own_takes_its_frozen_parts_from_a_pipeline(
    pipelines: Callable[..., Path], base: Callable[..., Denoiser], run_of: Callable[..., Run],
    tmp_path: Path,
) -> None:  # fmt: skip
    known, folder = base("sd").record, tmp_path / "frozen"
    shutil.copytree(pipelines("sd"), folder)
    shutil.rmtree(folder / "unet")  # nobody needs the denoiser of the pipeline
    description = {"model": known.model_config, "scheduler": known.scheduler_config}
    denoiser = random_denoiser(description, 3, device="cpu", pipeline=str(folder))
    own = {"p": 0.0, "consistency": 0.0, "projection": "none"}
    run = run_of("sd", text="1/1", denoiser=denoiser, **own)
    list(train(replace(run, from_scratch=True)))
    record = read_record(run.output, "base")
    assert (record.companions, record.source) == (known.companions, str(folder))
    load_denoiser(run.output)
    with pytest.raises(ConfigError, match=r"needs vae, text_encoder, tokenizer: .*--pipeline"):
        random_denoiser(description, 0, device="cpu")
    with pytest.raises(MissingError, match="--pipeline"):
        random_denoiser(description, 0, device="cpu", pipeline=str(tmp_path))
