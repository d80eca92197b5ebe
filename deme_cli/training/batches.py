"""The random draws of training: which images, which timesteps, which noise, which are mirrored.

Every draw is a function of (seed, range, update) alone, so that a resumed run needs no generator
state and continues bit for bit. Images are visited in epochs, each a permutation of all of them.
One generator serves a batch, in this order: timesteps, mirrored images, x_0 (crops and the noise of
its posterior, where there are any), eps, left-out captions. A process that takes a share of the
batch draws all of it, and decodes the images of its share.

On a GPU eps comes from a generator there, which the batch's own seeds: other noise than on a
processor, of the same seed the same on every GPU of one kind. There batches are made ready by
another thread while the one before is used; on processors it would take its time from the training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from deme_cli.config import FinetuneConfig
from deme_cli.data.images import KEEP_BYTES
from deme_cli.diffusion.conditions import Conditions, fill_null
from deme_cli.diffusion.schedule import Schedule
from deme_cli.distributed import World
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import WHOLE, Examples, PixelExamples, send
from deme_cli.training.objective import draw_by_cluster, draw_timesteps

if TYPE_CHECKING:
    from deme_cli.training.setup import Run

_SHARE = 0.2  # of the memory that is free before the first update, for images


@dataclass(frozen=True)
class Batch:
    """x0, eps: (B, C, H, W), pixels in [-1, 1] or latents; t: (B,) draws; conditions: (B, ...)."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    conditions: Conditions

    def part(self, chosen: slice) -> Batch:
        """Some of its members."""
        conditions = {name: value[chosen] for name, value in self.conditions.items()}
        return Batch(self.x0[chosen], self.eps[chosen], self.t[chosen], conditions)

    def on(self, device: torch.device) -> Batch:
        """The batch on a GPU."""
        x0, eps, t = (send(tensor, device) for tensor in (self.x0, self.eps, self.t))
        conditions = {name: send(value, device) for name, value in self.conditions.items()}
        return Batch(x0, eps, t, conditions)


class Batches(Protocol):
    """Where batches come from."""

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of update `step` (from 0), accumulation part `micro`."""
        ...


def derived_generator(*parts: object) -> torch.Generator:
    """A CPU generator whose seed is a hash of `parts`."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class BatchSource:
    """Draws the batches of one run. `micro` counts batches within an accumulated update.

    With `clusters` of draws the timesteps come from those in equal parts. `share`: the images of
    every batch that are wanted, all by default. `device`: the GPU that they are for, where eps is
    drawn and the batch lies; None leaves all of it on the processor.
    """

    def __init__(
        self, examples: Examples, span: TimestepRange, schedule: Schedule,
        config: FinetuneConfig, *, flip: bool, clusters: Sequence[TimestepRange] = (),
        share: slice = WHOLE, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.examples, self.span, self.config, self.flip = examples, span, config, flip
        self.clusters, self.share, self.device = clusters, share, device
        self.draws, self.num_train_timesteps = schedule.indices(span), schedule.num_train_timesteps
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)
        self._null: Conditions | None = None

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of update `step` (from 0), accumulation part `micro`; of it, the share."""
        config, share = self.config, self.share
        generator = derived_generator(config.seed, self.span, step, micro)
        count = step * config.accumulation + micro
        t = self._timesteps(generator)
        flip = torch.rand(config.batch_size, generator=generator) < 0.5 if self.flip else None
        indices = self._indices(count * config.batch_size, config.batch_size)
        x0, conditions = self.examples.draw(indices, flip=flip, generator=generator, share=share)
        eps = self._noise((config.batch_size, *x0.shape[1:]), generator)[share]
        batch = Batch(x0, eps, t[share], self._leave_out(conditions, generator))
        return batch if self.device is None else batch.on(self.device)

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.device is None:
            return torch.randn(shape, generator=generator)
        seed = int(torch.randint(1 << 62, (), generator=generator))
        there = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=there, device=self.device)

    def _timesteps(self, generator: torch.Generator) -> Tensor:
        config = self.config
        if self.clusters:
            return draw_by_cluster(config.batch_size, self.clusters, generator=generator)
        return draw_timesteps(
            config.batch_size, self.draws, self.num_train_timesteps, p=config.p,
            per_batch=config.timesteps == "per-batch", antithetic=config.antithetic,
            generator=generator,
        )  # fmt: skip

    def _leave_out(self, conditions: Conditions, generator: torch.Generator) -> Conditions:
        """Replace what is said of some images by nothing, each with the caption dropout."""
        if not conditions or not self.config.caption_dropout:
            return conditions
        dropped = torch.rand(self.config.batch_size, generator=generator)
        if self._null is None:
            self._null = self.examples.null()
        return fill_null(conditions, self._null, dropped[self.share] < self.config.caption_dropout)

    def _indices(self, start: int, num: int) -> list[int]:
        """Images start .. start + num - 1 of the endless sequence of epochs."""
        chosen: list[int] = []
        while len(chosen) < num:
            epoch, offset = divmod(start + len(chosen), len(self.examples))
            if epoch != self._epoch:
                generator = derived_generator(self.config.seed, self.span, "epoch", epoch)
                self._order = torch.randperm(len(self.examples), generator=generator)
                self._epoch = epoch
            chosen += self._order[offset : offset + num - len(chosen)].tolist()
        return chosen


def share_of(num: int, world: World) -> slice:
    """The images of a batch of `num` that this process takes; first ones may take one more."""
    each, more = divmod(num, world.size)
    start = world.rank * each + min(world.rank, more)
    return slice(start, start + each + (world.rank < more))


@contextmanager
def open_batches(run: Run, world: World, device: torch.device) -> Iterator[Batches]:
    """The batches of `run`, as far as this process shares in them, for a network on `device`."""
    gpu = device if device.type == "cuda" else None
    if gpu is not None and isinstance(run.examples, PixelExamples):
        size = len(run.examples) * math.prod(run.examples.shape)  # a byte for each value
        if run.examples.crop == "centre" and _has_room(size, gpu):
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


def _has_room(num_bytes: int, device: torch.device) -> bool:
    """Whether images of this size may lie on a GPU for as long as a run takes."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached  # of the range trained before, for one
    return num_bytes <= min(KEEP_BYTES, _SHARE * free)


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
