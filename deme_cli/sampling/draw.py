"""The procedure of `sample` and `ensemble-sample`: draw what is missing, keep it, finish.

Several processes draw together: each its share of the batches, and the first one writes them, in
order. So the files are those of one process, and any number of processes goes on with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deme_cli.config import SampleConfig
from deme_cli.distributed import ALONE, World
from deme_cli.files import require_output
from deme_cli.sampling.compiled import CompiledSteps
from deme_cli.sampling.conditioning import Conditioning
from deme_cli.sampling.ensemble import SamplingExpert
from deme_cli.sampling.preview import MAX_IMAGES, preview_path, write_preview
from deme_cli.sampling.sampler import ImageBatch, StepProgress, sample_images
from deme_cli.sampling.samples_file import SamplesFile, open_samples_file
from deme_cli.sampling.samples_folder import SamplesFolder, open_samples_folder
from deme_cli.sampling.shares import DrawingStops, Shares
from deme_cli.sampling.store import Order, is_folder


@dataclass(frozen=True)
class Drawn:
    """The end: the images and the preview, and how many images an earlier run had left."""

    images: Path
    preview: Path
    num_kept: int


def draw_samples(
    experts: Sequence[SamplingExpert],
    config: SampleConfig,
    order: Order,
    *,
    conditioning: Conditioning | None = None,
    hold_one: bool = False,
    compile: str = "off",
    world: World = ALONE,
) -> Iterator[StepProgress | Drawn]:
    """Draw the images of `order` and write them with a preview; yields progress, then a Drawn.

    compile: as `compile_network` takes it. Of several processes the first writes, and it alone
    yields a Drawn; progress counts what is known to be done.
    SIGINT, SIGTERM and SIGUSR1 end it with Stopped: finished batches are kept, and the same call
    goes on from there. Raises what the stores and `sample_images` raise, Lost where another
    process has ended.
    """
    with ExitStack() as stack:
        world.require_same(
            {"output": str(order.path), "batch_size": order.batch_size, **order.card}
        )
        store = stack.enter_context(open_store(order)) if world.is_first else None
        stop = DrawingStops(world)
        stack.enter_context(stop)
        if store is not None and not store.first:
            require_output(preview_path(order.path), force=order.force)
        first = num_done = world.largest(store.first if store else 0)  # the output is ours
        shares = Shares(order.num, config.batch_size, first, world)
        compiled = CompiledSteps(
            compile, num_forwards=len(shares.own) * config.steps, num_loads=len(experts)
        )
        drawing = sample_images(
            experts, config, conditioning=conditioning, hold_one=hold_one, first=first, world=world,
            compiled=compiled,
        )  # fmt: skip
        for record in _in_rounds(drawing, shares):
            if isinstance(record, StepProgress):
                yield record
            else:
                num_done = record.num_done
                if store is not None:
                    for images in record.batches:
                        store.add(images)
            stop.go_on(
                f"stopped; {num_done} of {order.num} images for {order.path} are kept, run the "
                f"same command again to go on"
            )
        if store is None:
            return
        preview = preview_path(order.path)
        write_preview(preview, store.head(MAX_IMAGES))
        path = store.finish()
    yield Drawn(path, preview, first)


def open_store(order: Order) -> AbstractContextManager[SamplesFolder | SamplesFile]:
    """Where the images of an order go."""
    return open_samples_folder(order) if is_folder(order.path) else open_samples_file(order)


@dataclass(frozen=True)
class _Round:
    """A batch of each process, in order, on the first one; `num_done` images are there with it."""

    batches: list[np.ndarray]  # uint8 (B, H, W, C) each
    num_done: int


def _in_rounds(
    drawing: Iterator[StepProgress | ImageBatch], shares: Shares
) -> Iterator[StepProgress | _Round]:
    """What this process draws, and after each round what all have drawn.

    Of others, progress counts the images that are here, so it falls behind rather than promises.
    """
    num_rounds = 0
    own: StepProgress | None = None  # of this process alone
    for record in shares.rounds(drawing):
        if isinstance(record, StepProgress):
            own = record
        else:
            images = None if record is None else record.images
            num_rounds += 1
            yield _Round(shares.gather(images), shares.num_done(num_rounds))
        if own is not None:
            others = shares.num_of_others(num_rounds) * (own.total // shares.num)
            yield replace(own, done=own.done + others)
