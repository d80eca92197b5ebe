"""The procedure of `sample` and `ensemble-sample`: draw what is missing, keep it, finish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deme_cli.config import SampleConfig
from deme_cli.interrupts import StopRequests
from deme_cli.outputs import require_output
from deme_cli.sampling.preview import MAX_IMAGES, preview_path, write_preview
from deme_cli.sampling.sampler import ImageBatch, SamplingExpert, StepProgress, sample_images
from deme_cli.sampling.samples_file import SamplesFile
from deme_cli.sampling.samples_folder import SamplesFolder
from deme_cli.sampling.scene import Scene
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
    scene: Scene | None = None,
    hold_one: bool = False,
) -> Iterator[StepProgress | Drawn]:
    """Draw the images of `order` and write them with a preview; yields progress, then a Drawn.

    SIGINT, SIGTERM and SIGUSR1 end it with Stopped: finished batches are kept, and the same call
    goes on from there. Raises what the stores and `sample_images` raise.
    """
    store = SamplesFolder(order) if is_folder(order.path) else SamplesFile(order)
    with store, StopRequests() as stop:
        num_done, preview = store.first, preview_path(order.path)
        if not num_done:
            require_output(preview, force=order.force)
        drawing = sample_images(experts, config, scene=scene, hold_one=hold_one, first=store.first)
        for record in drawing:
            if isinstance(record, ImageBatch):
                store.add(record)
                num_done = record.done
            else:
                yield record
            if stop.asked:
                raise stop.stopped(
                    f"stopped; {num_done} of {order.num} images for {order.path} are kept, run "
                    f"the same command again to go on"
                )
        write_preview(preview, store.head(MAX_IMAGES))
        images = store.finish()
    yield Drawn(images, preview, store.first)
