"""Batches made ready while a GPU works on the one before.

A batch is a function of (update, part) alone, so it may be made ahead by another thread, which then
is the only one that asks the examples. On processors nothing is made ahead: there the thread would
take its time from the training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from deme_cli.distributed import World
from deme_cli.training.batches import Batch, Batches, BatchSource
from deme_cli.training.data_parallel import share_of
from deme_cli.training.examples import PixelExamples
from deme_cli.training.on_device import has_room
from deme_cli.training.run import Run


@contextmanager
def open_batches(run: Run, world: World, device: torch.device) -> Iterator[Batches]:
    """The batches of `run`, as far as this process shares in them, for a network on `device`."""
    gpu = device if device.type == "cuda" else None
    if gpu is not None and isinstance(run.examples, PixelExamples):
        size = len(run.examples) * math.prod(run.examples.shape)  # a byte for each value
        if run.examples.crop == "centre" and has_room(size, gpu):
            run.examples.keep_on(gpu)
    source = BatchSource(
        run.examples, run.choice.range, run.denoiser.schedule, run.config, flip=run.flip,
        clusters=run.clusters, share=share_of(run.config.batch_size, world), device=gpu,
    )  # fmt: skip
    if gpu is None or run.examples.runs_vae:  # two threads do not share a VAE
        yield source
        return
    with Ahead(source, run.config.steps, run.config.accumulation, gpu) as ahead:
        yield ahead


class Ahead:
    """The batches of `source`, each made by a thread while the one before it is used.

    Batches may be asked for in any order; those in the order of training are made ahead.
    """

    def __init__(
        self, source: Batches, steps: int, accumulation: int, device: torch.device
    ) -> None:
        self._source, self._steps, self._accumulation = source, steps, accumulation
        # a thread begins on the first GPU, where pinning would open a context for nothing
        first = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._pool = ThreadPoolExecutor(1, "deme-batch", *first)
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of update `step` (from 0), accumulation part `micro`."""
        place, ready = self._next or (None, None)
        if ready is None or place != (step, micro):  # the first one, or an update begins anew
            ready = self._pool.submit(self._source.batch, step, micro)
        batch = ready.result()
        following = (step, micro + 1) if micro + 1 < self._accumulation else (step + 1, 0)
        self._next = None
        if following[0] < self._steps:
            self._next = (following, self._pool.submit(self._source.batch, *following))
        return batch
