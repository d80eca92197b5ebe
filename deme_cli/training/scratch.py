"""A denoiser with random weights, for training a base of one's own."""

from __future__ import annotations

from typing import Any

import torch

from deme_cli.artifacts import fingerprint
from deme_cli.diffusion.denoiser import Denoiser, build_network, choose_device
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.records import BaseRecord


def random_denoiser(description: dict[str, Any], seed: int, *, device: str) -> Denoiser:
    """The denoiser that {model, scheduler} describes, its weights drawn from `seed`."""
    model = {"_class_name": "UNet2DModel", **description["model"]}
    scheduler = {"_class_name": "DDPMScheduler", **description["scheduler"]}
    with torch.random.fork_rng(devices=[]):  # diffusers initialises from the global generator
        torch.manual_seed(seed)
        network = build_network(model, "[model]")
    schedule = read_schedule(scheduler, "[scheduler]")
    record = BaseRecord(
        source="trained from scratch",
        model_config={**dict(network.config), "_class_name": model["_class_name"]},
        scheduler_config=scheduler,
        num_train_timesteps=schedule.num_train_timesteps,
        fingerprint=fingerprint(network.state_dict()),
    )
    network.to(choose_device(device)).eval().requires_grad_(False)
    return Denoiser(network, schedule, record)
