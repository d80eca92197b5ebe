"""Where a network can be put, and what it is measured on: the errors of a place. n draws.

Whoever measures places needs no more than a `Setup`, and opens models and images by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deme_cli.analysis.draws import open_images_of
from deme_cli.analysis.landscape.directions import random_direction
from deme_cli.analysis.landscape.subspace import (
    Subspace,
    float_names,
    mixed_directions,
    open_origin,
    read_weights,
    subspace_of,
    with_identities,
)
from deme_cli.analysis_config import LandscapeConfig
from deme_cli.config import DataConfig
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.schedule import Schedule
from deme_cli.merge_config import MergeConfig
from deme_cli.merging.search.losses import HeldOutLoss
from deme_cli.records import DenoiserRecord
from deme_cli.sampling.noise import seeded_noise
from deme_cli.training.examples import Examples
from deme_cli.training.held_out import Check, FixedDraws


@dataclass(frozen=True)
class Setup:
    """All that a process needs to measure points. `arguments`: of the origin, then of the others.

    mixing: (k, N), how directions are made of the others' differences; None: random ones.
    """

    arguments: tuple[str, ...]
    with_projections: bool
    mixing: np.ndarray | None
    config: LandscapeConfig
    images: DataConfig
    split: str
    cache: str
    beside: Path
    pipeline: str | None
    device: str

    def open_examples(self, record: DenoiserRecord) -> tuple[DenoiserRecord, Examples]:
        """The images as a model of this record takes them, and the record with its frozen parts."""
        return open_images_of(
            record, self.images, split=self.split, cache=self.cache, beside=self.beside,
            pipeline=self.pipeline, device=self.device,
        )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A point by its coordinates, or one of the models itself, by its number; on which draws."""

    coordinates: tuple[float, ...] = ()
    model: int | None = None
    fresh: bool = False


# The number of each place among those given, and its errors (n,), in the order they are finished.
Measured = Iterator[tuple[int, np.ndarray]]
Crew = Callable[[Sequence[Place]], Measured]  # who measures places


class Field:
    """The network, where it can be put, and what it is measured on; opened when it is asked."""

    def __init__(self, setup: Setup, examples: Examples | None = None) -> None:
        self.setup, self._examples = setup, examples
        self._draws: dict[bool, FixedDraws] = {}

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        setup = self.setup
        return open_origin(
            setup.arguments[0], with_projections=setup.with_projections, device=setup.device
        )

    @functools.cached_property
    def subspace(self) -> Subspace:
        network, setup = self.denoiser.network, self.setup
        if setup.mixing is not None:
            directions = mixed_directions(network, setup.arguments[1:], setup.mixing)
        else:
            drawn = [random_direction(network.state_dict(), setup.config.seed, i) for i in (0, 1)]
            device = self.denoiser.device
            directions = [{name: one.to(device) for name, one in d.items()} for d in drawn]
        return subspace_of(network, directions)

    def errors(self, place: Place, check: Check) -> np.ndarray:
        """The squared error of each draw at a place: (n,) float64."""
        network, subspace = self.denoiser.network, self.subspace
        if place.model is None:
            subspace.put(network, place.coordinates)
        else:
            own = network.state_dict()
            weights = with_identities(read_weights(self.setup.arguments[place.model])[1], own)
            for name in float_names(own):
                own[name].copy_(weights[name])
        return self._draws_of(place.fresh).errors(network, check=check).numpy()

    def _draws_of(self, fresh: bool) -> FixedDraws:
        """The noise is drawn once where many points ask for it."""
        if fresh not in self._draws:
            if self._examples is None:
                self._examples = self.setup.open_examples(self.denoiser.record)[1]
            examples, config = self._examples, self.setup.config
            draws = held_out_loss(examples, self.denoiser.schedule, config, fresh=fresh).draws
            if not fresh:
                eps = seeded_noise(config.seed, examples.shape, range(config.num))
                draws = replace(draws, noise=eps.__getitem__)
            self._draws[fresh] = draws
        return self._draws[fresh]


def held_out_loss(
    examples: Examples, schedule: Schedule, config: LandscapeConfig, *, fresh: bool
) -> HeldOutLoss:
    """The draws of every point, or the fresh ones: draw i from (seed, i), t stratified over [0, T).

    The fresh ones are those of seed + 1.
    """
    num, seed = (config.report_num, config.seed + 1) if fresh else (config.num, config.seed)
    settings = MergeConfig(num=num, seed=seed, batch_size=config.batch_size)
    return HeldOutLoss(examples, schedule, settings)
