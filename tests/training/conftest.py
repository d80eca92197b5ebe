"""Tiny pipelines as bases, twenty captioned images, and examples of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_base
from PIL import Image

from deme_cli.artifacts import write_artifact
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.checkpoints import import_model
from deme_cli.diffusion.companions import Companions, open_companions
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser
from deme_cli.timesteps import parse_range
from deme_cli.training.examples import Examples, PixelExamples, open_examples
from deme_cli.training.setup import Run

NUM_IMAGES, NUM_CLASSES = 20, 5


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twenty colour images of several sizes, each with a caption and a class."""
    folder = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(1)
    rows = []
    for index in range(NUM_IMAGES):
        height, width = int(rng.integers(16, 30)), int(rng.integers(16, 30))
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:02d}.png")
        rows.append(
            {
                "file_name": f"{index:02d}.png",
                "text": f"a photo of thing number {index}",
                "label": index % NUM_CLASSES,
                "other": f"another caption {index}",
            }
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="session")
def base(
    pipelines: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Denoiser]:
    """The denoiser of a tiny pipeline by name, each loaded once; nothing may change it."""
    made: dict[str, Denoiser] = {}

    def denoiser(name: str, **options: object) -> Denoiser:
        key = f"{name} {sorted(options.items())}"
        if key not in made:
            model = import_model(str(pipelines(name, **options)))
            path = tmp_path_factory.mktemp("base") / "base.safetensors"
            write_artifact(path, model.weights, model.record)
            made[key] = load_denoiser(path)
        return made[key]

    return denoiser


@pytest.fixture(scope="session")
def companions(base: Callable[..., Denoiser]) -> Callable[..., Companions]:
    """The frozen parts of a tiny pipeline, shared by tests that do not let go of them."""
    made: dict[str, Companions] = {}

    def opened(name: str, **options: object) -> Companions:
        key = f"{name} {sorted(options.items())}"
        if key not in made:
            made[key] = open_companions(base(name, **options).record)
        return made[key]

    return opened


@pytest.fixture
def examples(captioned: Path, companions: Callable[..., Companions]) -> Callable[..., Examples]:
    """Uncached examples of the captioned images for a tiny pipeline by name."""

    def opened(name: str, *, split: str = "train", **images: object) -> Examples:
        data = DataConfig(source=str(captioned), **images)
        return open_examples(data, companions(name), split=split)

    return opened


@pytest.fixture(scope="session")
def digits_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base of 100 timesteps for the digits."""
    path = tmp_path_factory.mktemp("digits") / "base.safetensors"
    write_tiny_base(path)
    return path


@pytest.fixture(scope="session")
def digits_run(digits_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A run from that base, for its second quarter, in a folder of its own.

    Each loads the base anew: a run compiles its network in place, or moves it.
    """
    train, held_out = (
        PixelExamples(open_images("digits", shape=(1, 8, 8), split=split))
        for split in ("train", "held-out")
    )

    def make(config: FinetuneConfig, text: str = "2/4", **own: object) -> Run:
        choice = parse_range(text, 100)
        return Run(
            load_denoiser(digits_base), choice, train, held_out if config.held_out else None,
            flip=False, config=config, **own,
            output=tmp_path_factory.mktemp("run") / f"ft_{choice.label}.safetensors",
        )  # fmt: skip

    return make
