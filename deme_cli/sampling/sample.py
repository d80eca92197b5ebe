"""`sample` and `ensemble_sample`: images of one model, or of experts that take turns (Eq. 7).

Several processes draw together: each its share of the batches, and the first one writes them, in
order. So the files are those of one process, and any number of processes goes on with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.artifacts import DenoiserRecord, ExpertRecord
from deme_cli.config import SampleConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.data.prompts import prompt_assets
from deme_cli.distributed import joined
from deme_cli.fetch import fetch
from deme_cli.files import require_output
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.sampling.conditioning import Conditioning
    from deme_cli.sampling.ensemble import SamplingExpert
    from deme_cli.sampling.store import Samples

    Opened = tuple[Sequence[SamplingExpert], Sequence[DenoiserRecord]]

ENSEMBLE_NAME = "ensemble.safetensors"


@dataclass(frozen=True)
class Images:
    """Images that were drawn: where they lie, and the protocol they were drawn under.

    num_kept: how many of `num` an earlier, stopped run had left. Nothing lies there after a dry
    run.
    """

    path: Path
    preview: Path
    shape: tuple[int, int, int]  # (H, W, C)
    num: int
    num_kept: int = 0
    seconds: float = 0.0
    protocol: dict[str, Any] = field(default_factory=dict)


def sample(
    model: str | Path, settings: SampleConfig | None = None, *, output: Path | None = None,
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    dtype: str = "fp32", compile: str = "auto", force: bool = False, dry_run: bool = False,
    progress: Progress = silent,
) -> Images:  # fmt: skip
    """Draw images from one model; a stopped run goes on when the same is asked again.

    model: an artifact, a diffusers folder, a hub id, or digits.   settings: those of `run` if None.
    output: a .safetensors artifact or a folder for PNG files; None for a name made from the
    model's. Image i depends on the seed, i and its prompt or class alone. The processes that this
    one has joined share the batches.   progress: is told how far it is. With `dry_run` all is
    checked, and nothing is drawn.

    Raises ConfigError, MissingError or ArtifactError before anything is drawn, Stopped after a
    signal: finished batches are kept; NumericsError where the model makes images that are not
    finite, Lost where another process has ended.
    """

    def open_model(pipeline: str | None, device: str) -> Opened:
        from deme_cli.sampling.ensemble import open_single

        experts, record = open_single(
            str(model), run=run, pipeline=pipeline, device=device, dtype=dtype
        )
        if isinstance(record, ExpertRecord) and len(record.timesteps) < record.num_train_timesteps:
            console.warn(
                f"{model} is the expert of timesteps {record.timesteps} and will denoise all "
                f"{record.num_train_timesteps}; deme ensemble-sample takes each expert for its own"
            )
        return experts, [record]

    if output is None:
        name = Path(model).expanduser().resolve().name.removesuffix(".safetensors")
        output = Path(f"{name}-samples.safetensors")
    return _draw(
        open_model, settings, inputs=[Path(model)], output=output, run=run, pipeline=pipeline,
        device=device, dtype=dtype, compile=compile, force=force, dry_run=dry_run,
        progress=progress,
    )  # fmt: skip


def ensemble_sample(
    experts: Sequence[Path], settings: SampleConfig | None = None, *,
    output: Path = Path(ENSEMBLE_NAME), run: RunFile | None = None, pipeline: str | None = None,
    device: str = "auto", dtype: str = "fp32", compile: str = "auto", force: bool = False,
    dry_run: bool = False, progress: Progress = silent,
) -> Images:  # fmt: skip
    """Draw images with each expert denoising the timesteps of its own range (Eq. 7).

    experts: of one base, their ranges covering all timesteps. The rest is as for `sample`.
    """

    def open_experts(pipeline: str | None, device: str) -> Opened:
        from deme_cli.sampling.ensemble import open_ensemble, read_ensemble

        records = [member.record for member in read_ensemble(experts)]
        return open_ensemble(experts, run=run, device=device, dtype=dtype), records

    return _draw(
        open_experts, settings, inputs=experts, output=output, run=run, pipeline=pipeline,
        device=device, dtype=dtype, compile=compile, force=force, dry_run=dry_run,
        progress=progress,
    )  # fmt: skip


def _draw(
    open_models: Callable[[str | None, str], Opened], settings: SampleConfig | None, *,
    inputs: Sequence[Path], output: Path, run: RunFile | None, pipeline: str | None, device: str,
    dtype: str, compile: str, force: bool, dry_run: bool, progress: Progress,
) -> Images:  # fmt: skip
    """Draw what is missing of the images of experts, whose records are those of one base.

    Prompts that are not here lie beside the file of the run. The first process of a launch goes
    first, and it alone looks at the output and writes.
    """
    from deme_cli.sampling.store import Samples, is_folder, preview_path

    world, run = joined(), run or RunFile()
    config = settings or run.settings(SampleConfig)
    config = replace(config, prompts=config.prompts and run.seen(config.prompts))
    with world.first_before_others():
        if world.is_first and not is_folder(output):
            prompts = [Path(config.prompts)] if config.prompts else []
            require_output(output, force=force, inputs=[*inputs, *prompts])
        if config.prompts:
            fetch(prompt_assets(config.prompts), progress)
    progress(Step(label="loading the libraries and the model"))

    from deme_cli.sampling.conditioning import open_conditioning, protocol_card
    from deme_cli.sampling.sampler import image_seed

    pipeline, device = run.pipeline(pipeline), world.device or device
    experts, records = open_models(pipeline, device)
    about = open_conditioning(records[0], config, pipeline=pipeline, device=device, dtype=dtype)
    card = protocol_card(records, config, conditioning=about, dtype=dtype)
    channels, height, width = about.image_shape
    shape = height, width, channels
    images = Images(output, preview_path(output), shape, about.num, protocol=card)
    if dry_run:
        return images
    seeds = [image_seed(config.seed, index) for index in range(about.num)]
    samples = Samples(
        output, card, shape, seeds, config.batch_size, force, about.prompts, about.classes
    )
    began = time.monotonic()
    num_kept = _write(samples, experts, config, about, compile=compile, progress=progress)
    return replace(images, num_kept=num_kept, seconds=round(time.monotonic() - began, 3))


def _write(
    samples: Samples, experts: Sequence[SamplingExpert], config: SampleConfig,
    about: Conditioning, *, compile: str, progress: Progress,
) -> int:  # fmt: skip
    """Draw what is missing of `samples`; returns how many images were there."""
    from deme_cli.sampling.sampler import CompiledSteps, DrawingStops, Shares, sample_images
    from deme_cli.sampling.store import PREVIEWED, open_store, preview_path, write_preview

    world, output, num, preview = joined(), samples.path, samples.num, preview_path(samples.path)
    with ExitStack() as stack:
        world.require_same({"output": str(output), "batch_size": config.batch_size, **samples.card})
        store = stack.enter_context(open_store(samples)) if world.is_first else None
        stop = stack.enter_context(DrawingStops(world))
        if store is not None and not store.first:
            require_output(preview, force=samples.force)
        first = world.largest(store.first if store else 0)  # the output is ours
        shares = Shares(num, config.batch_size, first, world)
        num_forwards = len(shares.own) * config.steps
        compiled = CompiledSteps(compile, num_forwards=num_forwards, num_loads=len(experts))
        drawing = sample_images(
            experts, config, conditioning=about, first=first, world=world, compiled=compiled
        )
        for done, there, parts in shares.gather(drawing, lambda batch: batch.images):
            for part in parts:
                assert store is not None, "others get none"
                store.add(part)
            progress(Step(done, num, "sampling", "image"))
            stop.go_on(
                f"stopped; {there} of {num} images for {output} are kept, run the same command "
                f"again to go on"
            )
        if store is not None:
            write_preview(preview, store.head(PREVIEWED))
            store.finish()
    world.wait()  # nobody ends well before the images are there
    return first
