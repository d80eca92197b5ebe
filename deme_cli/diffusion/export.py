"""A denoiser as a diffusers pipeline folder, checked against the denoiser it came from.

The folder is written beside its place and renamed when it is whole and its outputs are those of the
artifact. Block projections cannot be folded into a diffusers network (the skips are taken before
them, and every consumer begins with a GroupNorm), so such artifacts are refused, never exported
without them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from deme_cli.diffusion.denoiser import Denoiser, predict
from deme_cli.errors import NumericsError, writing

LARGEST_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class ExportCheck:
    """The largest absolute difference of outputs (float32) over images drawn at `timesteps`."""

    max_difference: float
    timesteps: list[int]


def export_pipeline(
    denoiser: Denoiser, folder: Path, card: str, *, force: bool = False
) -> ExportCheck:
    """Write `denoiser` as a diffusers pipeline with the model card `card`, whole or not at all.

    Raises NumericsError if the pipeline, loaded again, does not give the denoiser's outputs;
    MissingError if the disk refuses. `force` replaces a folder that is there.
    """
    import diffusers

    diffusers.logging.set_verbosity(logging.CRITICAL)
    diffusers.logging.disable_progress_bar()
    with writing(folder), _whole_folder(folder, force=force) as partial:
        _pipeline(denoiser).save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        loaded = diffusers.DiffusionPipeline.from_pretrained(partial, local_files_only=True)
        check = compare(denoiser, loaded.unet)
        if not check.max_difference <= LARGEST_DIFFERENCE:
            raise NumericsError(
                f"{folder}: the exported pipeline differs from the artifact by "
                f"{check.max_difference:.3g}; nothing was written"
            )
    return check


@torch.inference_mode()
def compare(denoiser: Denoiser, network: nn.Module) -> ExportCheck:
    """How far `network` is from `denoiser` at x_t drawn for five timesteps from 0 to T - 1."""
    last = denoiser.schedule.num_train_timesteps - 1
    timesteps = sorted({last * part // 4 for part in range(5)})
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    network = network.to(denoiser.device).eval()
    for t in timesteps:
        x_t = torch.randn(1, *denoiser.sample_shape, generator=generator).to(denoiser.device)
        step = torch.tensor(t, device=denoiser.device)
        difference = predict(network, x_t, step) - predict(denoiser.network, x_t, step)
        largest = max(largest, difference.abs().max().nan_to_num(torch.inf).item())
    return ExportCheck(largest, timesteps)


def _pipeline(denoiser: Denoiser) -> object:
    """DDIMPipeline for a DDIM checkpoint; anything else is sampled by DDPM, as it was trained."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

    config = denoiser.record.scheduler_config
    if config.get("_class_name") == "DDIMScheduler":
        return DDIMPipeline(denoiser.network, DDIMScheduler.from_config(config))
    return DDPMPipeline(denoiser.network, DDPMScheduler.from_config(config))


@contextmanager
def _whole_folder(folder: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside `folder` that takes its place if the body ends well, else goes."""
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    replaced = folder.parent / f".{folder.name}.{os.getpid()}.replaced"
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            _sync(path)
        if force and folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make a file's bytes reach the disk before it is given its name."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
