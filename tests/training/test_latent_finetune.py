"""Experts of latent models through `train`: every backbone, every projection, broken off."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deme_cli.artifacts import read_record
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser, predict
from deme_cli.errors import ConfigError, MissingError
from deme_cli.timesteps import parse_range
from deme_cli.training.examples import open_examples
from deme_cli.training.setup import Run, random_denoiser
from deme_cli.training.train import train

SHORT = FinetuneConfig(
    steps=2, batch_size=3, lr=1e-3, checkpoint_every=2, held_out=3, caption_dropout=0.3
)


@pytest.fixture
def run_of(base: Callable[..., Denoiser], captioned: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run of a tiny pipeline's base; its cache lies beside the output."""

    def run(
        name: str, *, text: str = "1/2", denoiser: Denoiser | None = None, **settings: object
    ) -> Run:
        denoiser = denoiser or base(name)
        companions, config = open_companions(denoiser.record), replace(SHORT, **settings)
        images = DataConfig(source=str(captioned), resolution=16)
        own, held_out = (
            open_examples(images, companions, split=split, flips=flips, cache="auto",
                          beside=tmp_path)
            for split, flips in (("train", True), ("held-out", False))
        )  # fmt: skip
        choice = parse_range(text, denoiser.record.num_train_timesteps)
        output = tmp_path / f"ft_{choice.label}.safetensors"
        return Run(denoiser, choice, own, held_out, flip=True, config=config, output=output)

    return run


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "sd3", "flux"])
def test_a_range_of_every_backbone_becomes_an_expert(
    run_of: Callable[..., Run], base: Callable[..., Denoiser], name: str
) -> None:
    record, run = base(name).record, run_of(name)
    (last,) = train(run)
    assert min(last.loss, last.consistency) > 0  # after the first update
    assert last.held_out is not None
    expert = read_record(run.output, "expert")
    assert expert.base == record.fingerprint != expert.fingerprint
    assert (expert.companions, expert.source) == (record.companions, record.source)
    assert expert.training["resolution"] == [16, 16]
    x_t, conditions = run.examples.draw([0, 1], flip=None, generator=None)
    output = predict(load_denoiser(run.output).network, x_t, torch.tensor(700), conditions)
    assert output.isfinite().all()


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
