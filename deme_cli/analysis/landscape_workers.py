"""Points of a landscape measured here, or by several processes that share them.

Every point is measured by one process, batch by batch on the same draws, so its numbers do not
depend on how many processes there are. Each opens models and images by itself (`Setup` is all that
it is given) and holds what subspace.py says. n draws.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from deme_cli.analysis.directions import random_direction
from deme_cli.analysis.landscape_config import LandscapeConfig
from deme_cli.analysis.subspace import (
    Subspace,
    float_names,
    mixed_directions,
    open_origin,
    read_weights,
    subspace_of,
    with_identities,
)
from deme_cli.config import DataConfig
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.schedule import Schedule
from deme_cli.errors import MissingError
from deme_cli.merge_config import MergeConfig
from deme_cli.merging.search.losses import HeldOutLoss
from deme_cli.records import DenoiserRecord
from deme_cli.sampling.sampler import seeded_noise
from deme_cli.training.examples import Examples
from deme_cli.training.held_out import Check, FixedDraws
from deme_cli.training.materials import name_companions, open_examples

_POLL_SECONDS = 0.2  # between two looks for signals


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
        """The images as a model of this record takes them, and the record with its frozen parts.

        Raises what `open_companions` and `training.materials.open_examples` raise.
        """
        record = name_companions(record, self.pipeline)
        companions = open_companions(record, pipeline=self.pipeline, device=self.device)
        examples = open_examples(
            self.images, companions, split=self.split, cache=self.cache, beside=self.beside
        )
        return record, examples


@dataclass(frozen=True)
class Place:
    """A point by its coordinates, or one of the models itself, by its number."""

    coordinates: tuple[float, ...] = ()
    model: int | None = None


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

    def errors(self, place: Place, check: Check, *, fresh: bool) -> np.ndarray:
        """The squared error of each draw at a place: (n,) float64."""
        network, subspace = self.denoiser.network, self.subspace
        if place.model is None:
            subspace.put(network, place.coordinates)
        else:
            own = network.state_dict()
            weights = with_identities(read_weights(self.setup.arguments[place.model])[1], own)
            for name in float_names(own):
                own[name].copy_(weights[name])
        return self._draws_of(fresh).errors(network, check=check).numpy()

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


class Crew:
    """Who measures the points: this process, or `jobs` processes started for it.

    with Crew(field) as crew:
        for index, errors in crew.measure(places, check, fresh=False): ...

    The order is that in which points are finished. They start when they are first needed.
    """

    def __init__(self, field: Field) -> None:
        self.field, self.jobs = field, field.setup.config.jobs
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Crew:
        return self

    def measure(
        self, places: Sequence[tuple[int, Place]], check: Check, *, fresh: bool
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The index and the errors (n,) of each place.

        Raises what `check` raises, MissingError where a process was killed.
        """
        if self.jobs == 1 or not places:
            for index, place in places:
                check()
                yield index, self.field.errors(place, check, fresh=fresh)
            return
        waiting = list(reversed(places))
        running: dict[Future[Any], int] = {}
        while waiting or running:
            check()
            while waiting and len(running) < 2 * self.jobs:  # one is measured, one is ready
                index, place = waiting.pop()
                running[self._submit(place, check, fresh)] = index
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), _result(future, check)

    def _submit(self, place: Place, check: Check, fresh: bool) -> Future[np.ndarray]:
        try:
            return self._started().submit(_measure, place, fresh)
        except BrokenProcessPool as error:
            raise _killed(check) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._stop = context.Event()
            threads = max(1, torch.get_num_threads() // self.jobs)
            self._pool = ProcessPoolExecutor(
                self.jobs, context, _start, (self.field.setup, threads, self._stop)
            )
        return self._pool

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._stop.set()
            self._pool.shutdown(cancel_futures=True)


def _result(future: Future[np.ndarray], check: Check) -> np.ndarray:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _killed(check) from error


def _killed(check: Check) -> MissingError:
    check()  # who sent it the signal may have sent one here
    return MissingError(
        "a process that measures points was killed (out of memory?); run the same command again "
        "to continue, with fewer --jobs"
    )


# What follows runs in the processes.


class _Stopped(Exception):
    """The one who asked for this point is leaving."""


_field: Field
_leaving: Any


def _start(setup: Setup, threads: int, stop: Any) -> None:
    """Ctrl-C reaches all processes of a terminal: the one who watches decides, and tells these."""
    global _field, _leaving
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _field, _leaving = Field(setup), stop


def _leave_with_parent() -> None:
    """End where the one who watches was killed; nobody else would tell."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check(*progress: int) -> None:
    if _leaving.is_set():
        raise _Stopped


def _measure(place: Place, fresh: bool) -> np.ndarray:
    return _field.errors(place, _check, fresh=fresh)
