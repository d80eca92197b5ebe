"""A denoiser with random weights, for training a base of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deme_cli.artifacts import BaseRecord, fingerprint
from deme_cli.diffusion.backbones.backbone import config_of
from deme_cli.diffusion.backbones.known import backbone_of
from deme_cli.diffusion.denoiser import Denoiser, build_network, choose_device
from deme_cli.diffusion.model_files import digests_of, locate_parts
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ConfigError
from deme_cli.settings import nearest

_NO_PIPELINE = "trained from scratch"


_CLASSES: dict[str, dict[str, str]] = {
    "model": {"_class_name": "UNet2DModel"},
    "scheduler": {"_class_name": "DDPMScheduler"},
}


def require_known_keys(description: Mapping[str, Any], where: Path) -> None:
    """Check that the classes take every key of {model, scheduler}: diffusers drops the others.

    Raises ConfigError that offers the nearest known key.
    """
    import diffusers

    for table, default in _CLASSES.items():
        config = {**default, **description[table]}
        found: Any = getattr(diffusers, str(config["_class_name"]), None)
        if not hasattr(found, "from_config"):
            raise ConfigError(
                f"{where}: [{table}] diffusers has no class {config['_class_name']!r}"
            )
        known = set(inspect.signature(found).parameters) - {"kwargs"}
        for key in config:
            if not key.startswith("_") and key not in known:
                raise ConfigError(
                    f"{where}: unknown key {key!r} in [{table}] of {found.__name__}"
                    f"{nearest(key, sorted(known))}"
                )


def random_denoiser(
    description: Mapping[str, Any], seed: int, *, device: str, pipeline: str | None = None
) -> Denoiser:
    """The denoiser that {model, scheduler} describes, its weights drawn from `seed`.

    pipeline: the folder or hub id with the frozen parts of a model that has any; its own denoiser
    is not read. Raises ConfigError where such a model comes without one.
    """
    model, scheduler = ({**_CLASSES[name], **description[name]} for name in _CLASSES)
    source, companions = _NO_PIPELINE, {}
    if parts := backbone_of(model, "[model]").parts:
        if not pipeline:
            raise ConfigError(
                f"{model['_class_name']} needs {', '.join(parts)}: give the folder or hub id of a "
                f"pipeline that has them with --pipeline"
            )
        folder = locate_parts(pipeline, parts)
        source = str(folder.resolve()) if Path(pipeline).expanduser().is_dir() else pipeline
        companions = digests_of(folder)
    with torch.random.fork_rng(devices=[]):  # diffusers initialises from the global generator
        torch.manual_seed(seed)
        network = build_network(model, "[model]")
    schedule = read_schedule(scheduler, "[scheduler]")
    record = BaseRecord(
        source=source,
        model_config={**config_of(network), "_class_name": model["_class_name"]},
        scheduler_config=scheduler,
        num_train_timesteps=schedule.num_train_timesteps,
        companions=companions,
        fingerprint=fingerprint(network.state_dict()),
    )
    network.to(choose_device(device)).eval().requires_grad_(False)
    return Denoiser(network, schedule, record)
