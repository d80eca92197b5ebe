"""A denoiser as a diffusers pipeline folder, checked against the denoiser it came from.

The folder is written beside its place and renamed when it is whole and its outputs are those of the
artifact. Frozen parts (VAE, text encoders, tokenizers) are copied byte for byte from the pipeline
that the base came from. Block projections cannot be folded into a diffusers network (the skips are
taken before them, and every consumer begins with a norm), so such artifacts are refused, never
exported without them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deme_cli.diffusion.companions import Companions
from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.denoiser import Denoiser, predict
from deme_cli.diffusion.model_files import INDEX, read_json, read_scheduler
from deme_cli.diffusion.schedule import complete_config, scheduler_of
from deme_cli.errors import NumericsError, writing

LARGEST_DIFFERENCE = 1e-5
_LATENT_SIDE = 32  # pixels of x_t for the check, at most: it is the weights that are compared


@dataclass(frozen=True)
class ExportCheck:
    """The largest absolute difference of outputs (float32) over images drawn at `timesteps`."""

    max_difference: float
    timesteps: list[int]


def export_pipeline(
    denoiser: Denoiser, companions: Companions, folder: Path, card: str, *, force: bool = False
) -> ExportCheck:
    """Write `denoiser` as a diffusers pipeline with the model card `card`, whole or not at all.

    Raises NumericsError if the denoiser, loaded again, does not give the same outputs; MissingError
    if the disk refuses. `force` replaces a folder that is there.
    """
    from diffusers.utils import logging as remarks

    remarks.set_verbosity(logging.CRITICAL)
    remarks.disable_progress_bar()
    with writing(folder), _whole_folder(folder, force=force) as partial:
        if companions.folder is None:
            _write_pixel_pipeline(denoiser, partial)
        else:
            companions.require_same()
            _write_parts(denoiser, companions, companions.folder, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        backbone = denoiser.backbone
        loaded = backbone.network_class.from_pretrained(
            partial / backbone.part, local_files_only=True
        )
        check = compare(denoiser, loaded)
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
    shape = _small(denoiser)
    given = _any_conditions(denoiser, generator)
    for t in timesteps:
        x_t = torch.randn(1, *shape, generator=generator).to(denoiser.device)
        time = denoiser.schedule.times(torch.tensor([t], device=denoiser.device))
        difference = predict(network, x_t, time, given) - predict(
            denoiser.network, x_t, time, given
        )
        largest = max(largest, difference.abs().max().nan_to_num(torch.inf).item())
    return ExportCheck(largest, timesteps)


def _small(denoiser: Denoiser) -> tuple[int, int, int]:
    """The shape of x_t for the check: the model's own, or smaller where any size will do."""
    channels, height, width = denoiser.sample_shape
    if denoiser.backbone.wants != "text":
        return channels, height, width
    return channels, min(height, _LATENT_SIDE), min(width, _LATENT_SIDE)


def _any_conditions(denoiser: Denoiser, generator: torch.Generator) -> Conditions:
    """Random conditions of the right shapes: no text encoder is needed to compare two networks."""
    shapes = denoiser.backbone.condition_shapes(denoiser.record.model_config)
    return {name: _draw(shape, generator).to(denoiser.device) for name, shape in shapes.items()}


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers (1, *shape), or class 0 where the shape is ()."""
    if not shape:
        return torch.zeros(1, dtype=torch.long)
    return torch.randn(1, *shape, generator=generator)


def _write_pixel_pipeline(denoiser: Denoiser, target: Path) -> None:
    """DDIMPipeline for a DDIM checkpoint; anything else is sampled by DDPM, as it was trained."""
    from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler

    config = denoiser.record.scheduler_config
    kind: Any = DDIMPipeline if config.get("_class_name") == "DDIMScheduler" else DDPMPipeline
    kind(denoiser.network, scheduler_of(config, DDPMScheduler)).save_pretrained(target)
    if config.get("_class_name") in ("DDIMScheduler", "DDPMScheduler"):
        _write_scheduler(config, target)


def _write_scheduler(config: Mapping[str, Any], target: Path) -> None:
    """What the config states and no more: what it leaves open is for each sampler to fill in."""
    folder = target / "scheduler"
    folder.mkdir(exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "scheduler_config.json").write_text(text, encoding="utf-8")


def _write_parts(denoiser: Denoiser, companions: Companions, source: Path, target: Path) -> None:
    """The pipeline's index and frozen parts as they are, with this denoiser in its place."""
    from diffusers.models import ModelMixin

    network, backbone = denoiser.network, denoiser.backbone
    assert isinstance(network, ModelMixin)
    index = read_json(source / INDEX)
    unusual = companions.unusual_parts(index)
    for name, value in index.items():
        listed = isinstance(value, list) and bool(value[0])
        if not listed or name in (backbone.part, "scheduler"):
            continue
        if (source / name).is_dir():
            if name in unusual:
                unusual[name].save_pretrained(target / name)
            else:
                shutil.copytree(source / name, target / name)
        else:  # a safety checker that was not fetched: the pipeline loads without it
            index[name] = [None, None]
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    index[backbone.part] = ["diffusers", backbone.class_name]
    config = denoiser.record.scheduler_config
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    network.save_pretrained(target / backbone.part)
    is_same = complete_config(read_scheduler(source)[0]) == complete_config(config)
    if is_same and (source / "scheduler").is_dir():
        shutil.copytree(source / "scheduler", target / "scheduler")
    else:
        _write_scheduler(config, target)


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
