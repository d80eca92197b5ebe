"""Runs of training on the digits with a tiny base of 100 timesteps, for its second quarter."""

from __future__ import annotations

from pathlib import Path

from conftest import write_tiny_base

from deme_cli.config import FinetuneConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.timesteps import parse_range
from deme_cli.training.examples import PixelExamples
from deme_cli.training.setup import Run


def digits_run(folder: Path, config: FinetuneConfig) -> Run:
    """The run of ft_2of4.safetensors in `folder`, where its base is written."""
    write_tiny_base(folder / "base.safetensors")
    denoiser = load_denoiser(folder / "base.safetensors")
    shape, held_out = denoiser.sample_shape, None
    if config.held_out:
        held_out = PixelExamples(open_images("digits", shape=shape, split="held-out"))
    return Run(
        denoiser=denoiser,
        choice=parse_range("2/4", 100),
        examples=PixelExamples(open_images("digits", shape=shape)),
        held_out=held_out,
        flip=False,
        config=config,
        output=folder / "ft_2of4.safetensors",
    )
