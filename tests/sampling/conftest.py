"""Tiny pipelines, opened once: denoisers, scenes around them, and diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest

from deme_cli.config import SampleConfig
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.companions import Companions, open_companions
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.sampling.conditioning import Conditioning, conditioning_of


@pytest.fixture(scope="session")
def opened(pipelines: Callable[..., Path]) -> Callable[..., Denoiser]:
    """The denoiser of a tiny pipeline by name."""
    made: dict[Path, Denoiser] = {}

    def get(name: str, **build: Any) -> Denoiser:
        folder = pipelines(name, **build)
        if folder not in made:
            made[folder] = open_denoiser(str(folder))
        return made[folder]

    return get


@pytest.fixture(scope="session")
def conditioning_for() -> Callable[[Denoiser, SampleConfig], Conditioning]:
    """The conditioning of such a denoiser; its frozen parts are loaded once."""
    made: dict[str, Companions] = {}

    def get(denoiser: Denoiser, config: SampleConfig) -> Conditioning:
        source = denoiser.record.source
        if source not in made:
            made[source] = open_companions(denoiser.record)
        return replace(conditioning_of(denoiser, config), companions=made[source])

    return get


@pytest.fixture(scope="session")
def their_pipeline() -> Callable[[Denoiser], Any]:
    """diffusers' pipeline of the folder that such a denoiser came from, its scheduler fresh."""
    made: dict[str, Any] = {}

    def get(denoiser: Denoiser) -> Any:
        source = denoiser.record.source
        kind = getattr(diffusers, denoiser.backbone.pipeline)
        if source not in made:
            made[source] = kind.from_pretrained(source)
            made[source].set_progress_bar_config(disable=True)
        own = made[source].scheduler
        fresh = type(own).from_pretrained(source, subfolder="scheduler")
        return kind(**{**made[source].components, "scheduler": fresh})

    return get
