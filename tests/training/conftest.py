"""Tiny pipelines as bases, twenty captioned images, and examples of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deme_cli.artifacts import write_artifact
from deme_cli.config import DataConfig
from deme_cli.diffusion.checkpoints import import_model
from deme_cli.diffusion.companions import Companions, open_companions
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser
from deme_cli.training.examples import Examples, open_examples

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
def base_path(
    pipelines: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The base artifact of a tiny pipeline by name, each imported once."""
    made: dict[str, Path] = {}

    def path(name: str, **options: object) -> Path:
        key = f"{name} {sorted(options.items())}"
        if key not in made:
            model = import_model(str(pipelines(name, **options)))
            made[key] = tmp_path_factory.mktemp("base") / "base.safetensors"
            write_artifact(made[key], model.weights, model.record)
        return made[key]

    return path


@pytest.fixture(scope="session")
def base(base_path: Callable[..., Path]) -> Callable[..., Denoiser]:
    """The denoiser of a tiny pipeline by name, each loaded once; nothing may change it."""
    made: dict[Path, Denoiser] = {}

    def denoiser(name: str, **options: object) -> Denoiser:
        path = base_path(name, **options)
        if path not in made:
            made[path] = load_denoiser(path)
        return made[path]

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
