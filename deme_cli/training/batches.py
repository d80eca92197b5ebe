"""The draws of training: which images, which timesteps, which noise, which are mirrored.

Every draw is a function of (seed, range, update) alone, so that a resumed run needs no generator
state and continues bit for bit. Images are visited in epochs, each a permutation of all of them.
One generator serves a batch, in this order: timesteps, mirrored images, x_0 (crops and the noise of
its posterior, where there are any), eps, left-out captions. A process that takes a share of the
batch draws all of it, and decodes the images of its share.

On a GPU eps comes from a generator there, which the batch's own seeds: other noise than on a
processor, of the same seed the same on every GPU of one kind. There batches are made ready by
another thread while the one before is used; on processors it would take its time from the training.

`FixedDraws` are the same on every look: the denoising loss on images that training never sees.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.conditions import Conditions, fill_null, to
from deme_cli.diffusion.denoiser import predict
from deme_cli.diffusion.schedule import Schedule
from deme_cli.distributed import World
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import WHOLE, Examples
from deme_cli.training.objective import draw_by_cluster, draw_timesteps

if TYPE_CHECKING:
    from deme_cli.training.setup import Run

_BATCH = 256  # fixed draws at a time
Check = Callable[..., None]  # called between batches, with (done, total) if known; raises to stop


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
        """The batch on a device; a GPU is not waited for, as copies from pinned memory do not."""
        tensors = {"x0": self.x0, "eps": self.eps, "t": self.t, **self.conditions}
        for name, tensor in tensors.items():
            is_copied = device.type == "cuda" and tensor.device.type == "cpu"
            pinned = tensor.pin_memory() if is_copied else tensor
            tensors[name] = pinned.to(device, non_blocking=True)
        return Batch(tensors.pop("x0"), tensors.pop("eps"), tensors.pop("t"), tensors)


Draw = Callable[[int, int], Batch]  # of update `step` (from 0), accumulation part `micro`


def derived_generator(*parts: object) -> torch.Generator:
    """A CPU generator whose seed is a hash of `parts`."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class BatchSource:
    """Draws the batches of one run.

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

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of update `step` (from 0), accumulation part `micro`; of it, the share."""
        config, share, device, num = self.config, self.share, self.device, self.config.batch_size
        generator = derived_generator(config.seed, self.span, step, micro)
        if self.clusters:
            t = draw_by_cluster(num, self.clusters, generator=generator)
        else:
            t = draw_timesteps(
                num, self.draws, self.num_train_timesteps, p=config.p,
                per_batch=config.timesteps == "per-batch", antithetic=config.antithetic,
                generator=generator,
            )  # fmt: skip
        flip = torch.rand(num, generator=generator) < 0.5 if self.flip else None
        indices = self.indices((step * config.accumulation + micro) * num, num)
        x0, conditions = self.examples.draw(indices, flip=flip, generator=generator, share=share)
        there = generator
        if device is not None:
            seed = int(torch.randint(1 << 62, (), generator=generator))
            there = torch.Generator(device).manual_seed(seed)
        eps = torch.randn((num, *x0.shape[1:]), generator=there, device=device)[share]
        if conditions and config.caption_dropout:
            dropped = torch.rand(num, generator=generator)[share] < config.caption_dropout
            conditions = fill_null(conditions, self.examples.null(), dropped)
        batch = Batch(x0, eps, t[share], conditions)
        return batch if device is None else batch.on(device)

    def indices(self, start: int, num: int) -> list[int]:
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
def open_batches(run: Run, world: World, device: torch.device) -> Iterator[Draw]:
    """The batches of `run`, as far as this process shares in them, for a network on `device`."""
    gpu = device if device.type == "cuda" else None
    source = BatchSource(
        run.examples, run.choice.range, run.denoiser.schedule, run.config, flip=run.flip,
        clusters=run.clusters, share=share_of(run.config.batch_size, world), device=gpu,
    )  # fmt: skip
    if gpu is None or run.examples.runs_vae:  # two threads do not share a VAE
        yield source.batch
        return
    with made_ahead(source.batch, run.config, gpu) as draw:
        yield draw


@contextmanager
def made_ahead(draw: Draw, config: FinetuneConfig, device: torch.device) -> Iterator[Draw]:
    """`draw`, of which a thread makes each batch while the one before it is used.

    Batches may be asked for in any order; those in the order of training are made ahead.
    """
    # a thread begins on the first GPU, where pinning would open a context for nothing
    first = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
    pool = ThreadPoolExecutor(1, "deme-batch", *first)
    ready: dict[tuple[int, int], Future[Batch]] = {}

    def next_batch(step: int, micro: int) -> Batch:
        waiting = ready.pop((step, micro), None)  # none at first, or where an update is redone
        batch = (waiting or pool.submit(draw, step, micro)).result()
        following = (step, micro + 1) if micro + 1 < config.accumulation else (step + 1, 0)
        ready.clear()
        if following[0] < config.steps:
            ready[following] = pool.submit(draw, *following)
        return batch

    try:
        yield next_batch
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class FixedDraws:
    """What networks are measured on.  images, t: (n,)   noise(draws (B,)) -> eps (B, C, H, W)

    x_0 and the conditions come from the examples batch by batch, the mean of the posterior where
    there is a VAE; captions are never left out. targets: (n, C, H, W), what networks should say,
    where that is not the schedule's own target.
    """

    examples: Examples
    schedule: Schedule
    images: Tensor
    t: Tensor
    noise: Callable[[Tensor], Tensor]
    batch_size: int = _BATCH
    targets: Tensor | None = None

    @torch.no_grad()
    def errors(
        self, network: nn.Module, *, check: Check | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """Squared error of each draw, its mean over elements: (n,) float64.

        On the draws `chosen` (all by default). The network is run in its own dtype, the rest in
        float32, the sums in float64.
        """
        errors = []
        for part in (self._all if chosen is None else chosen).split(self.batch_size):
            if check:
                check()
            inputs, target = self._batch(part, network)
            error = predict(network, *inputs).float().cpu() - target
            errors.append(error.square().flatten(1).mean(dim=1, dtype=torch.float64))
        return torch.cat(errors)

    def loss(self, network: nn.Module, *, check: Check | None = None) -> float:
        """Mean squared error over draws and elements; see `errors`."""
        return self.errors(network, check=check).mean().item()

    def loss_and_gradient(self, network: nn.Module, check: Check) -> float:
        """The loss, and its gradient in `.grad` of every parameter of `network`."""
        network.requires_grad_(True)
        network.zero_grad(set_to_none=True)
        total, size = 0.0, len(self.t) * math.prod(self.examples.shape)
        for part in self._all.split(self.batch_size):
            check()
            inputs, target = self._batch(part, network)
            output = predict(network, *inputs).float()
            loss = (output - target.to(output.device)).square().sum() / size
            loss.backward()
            total += loss.item()
        network.requires_grad_(False)
        return total

    @torch.no_grad()
    def outputs(self, network: nn.Module, chosen: Tensor) -> Tensor:
        """What `network` says at the draws `chosen`: (len(chosen), C, H, W) float32."""
        inputs = (self._batch(part, network)[0] for part in chosen.split(self.batch_size))
        return torch.cat([predict(network, *one).float().cpu() for one in inputs])

    @property
    def _all(self) -> Tensor:
        return torch.arange(len(self.t))

    def _batch(
        self, chosen: Tensor, network: nn.Module
    ) -> tuple[tuple[Tensor, Tensor, Conditions], Tensor]:
        """The inputs of these draws on the network's device, and what it should say, on the CPU."""
        first = next(network.parameters())
        x0, conditions = self.examples.draw(self.images[chosen].tolist(), flip=None, generator=None)
        x0, eps, t = x0.cpu(), self.noise(chosen), self.t[chosen]
        inputs = (
            self.schedule.add_noise(x0, eps, t).to(first.device, first.dtype),
            self.schedule.times(t).to(first.device),
            to(conditions, first.device, first.dtype),
        )
        target = self.schedule.target(x0, eps, t) if self.targets is None else self.targets[chosen]
        return inputs, target


def draws_of_range(
    examples: Examples, span: TimestepRange, schedule: Schedule, num: int
) -> FixedDraws:
    """`num` draws with timesteps spread evenly over the range."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn((num, *examples.shape), generator=generator)
    span = schedule.indices(span)
    t = span.start + torch.arange(num) * len(span) // num
    t = t[torch.randperm(num, generator=generator)]
    images = torch.arange(num) % len(examples)
    return FixedDraws(examples, schedule, images, t, eps.__getitem__)
