"""Experts of latent models through `train`: every backbone, every projection, broken off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser, predict
from deme_cli.diffusion.projection import has_projections
from deme_cli.errors import ConfigError, MissingError
from deme_cli.timesteps import parse_range
from deme_cli.training.examples import LatentExamples, open_examples
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


@pytest.mark.parametrize(
    "projection",
    [pytest.param("fold", marks=pytest.mark.slow), "block"],  # of pixels: test_finetune.py
)
def test_a_resumed_run_on_latents_equals_an_uninterrupted_one_bit_for_bit(
    run_of: Callable[..., Run], projection: str
) -> None:
    settings = {"projection": projection, "steps": 6, "checkpoint_every": 2, "accumulation": 2}
    whole = run_of("sd", **settings)
    list(train(whole))
    record, losses = read_record(whole.output, "expert"), curve(whole)
    extra = has_projections(load_tensors(whole.output))
    assert extra == (projection == "block")
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


def test_posterior_noise_and_dropout_differ_between_updates_and_seeds(
    run_of: Callable[..., Run],
) -> None:
    from deme_cli.training.batches import BatchSource

    run = run_of("sd", cache="off")
    assert isinstance(run.examples, LatentExamples)

    def x0(seed: int, step: int) -> torch.Tensor:
        config = replace(SHORT, batch_size=19, seed=seed)  # an epoch: the same images every time
        source = BatchSource(
            run.examples, run.choice.range, run.denoiser.schedule, config, flip=False
        )
        batch = source.batch(step, 0)
        return batch.x0[torch.tensor(source.indices(step * 19, 19)).argsort()]

    assert torch.equal(x0(0, 0), x0(0, 0))
    assert not torch.allclose(x0(0, 0), x0(0, 1), atol=1e-3)
    assert not torch.allclose(x0(0, 0), x0(1, 0), atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_base_of_ones_own_takes_its_frozen_parts_from_a_pipeline(
    name: str, pipelines: Callable[..., Path], base: Callable[..., Denoiser],
    run_of: Callable[..., Run], tmp_path: Path,
) -> None:  # fmt: skip
    import shutil

    known = base(name).record
    folder = tmp_path / "frozen"
    shutil.copytree(pipelines(name), folder)
    shutil.rmtree(folder / base(name).backbone.part)  # nobody needs the denoiser of the pipeline
    description = {"model": known.model_config, "scheduler": known.scheduler_config}
    denoiser = random_denoiser(description, 3, device="cpu", pipeline=str(folder))
    assert denoiser.record.companions == known.companions
    assert denoiser.record.source == str(folder)
    own = {"p": 0.0, "consistency": 0.0, "projection": "none"}
    run = run_of(name, text="1/1", denoiser=denoiser, **own)
    run = replace(run, from_scratch=True, output=tmp_path / "own.safetensors")
    list(train(run))
    record = read_record(run.output, "base")
    assert (record.companions, record.source) == (known.companions, str(folder))
    write_artifact(tmp_path / "again.safetensors", load_tensors(run.output), record)
    load_denoiser(tmp_path / "again.safetensors")


def test_a_base_of_ones_own_without_frozen_parts_is_refused(
    base: Callable[..., Denoiser], tmp_path: Path
) -> None:
    known = base("sd").record
    description = {"model": known.model_config, "scheduler": known.scheduler_config}
    with pytest.raises(ConfigError, match=r"needs vae, text_encoder, tokenizer: .*--pipeline"):
        random_denoiser(description, 0, device="cpu")
    with pytest.raises(MissingError, match="--pipeline"):
        random_denoiser(description, 0, device="cpu", pipeline=str(tmp_path))
