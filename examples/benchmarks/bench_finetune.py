"""`deme finetune` against a minimal hand-written loop: the same network, data, optimizer, EMA.

Both train the same expert (probabilistic sampling, consistency loss, AdamW, clipping, the EMA of
diffusers) in one process, in turn, several rounds; printed is the ratio of updates per second,
deme / hand-written, per round: median (min to max). Above 0.95 is the aim.

    OMP_NUM_THREADS=1 uv run python examples/benchmarks/bench_finetune.py
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from rounds import machine, ratios, rounds_of, verdict

from deme_cli.config import FinetuneConfig
from deme_cli.data.digits import BASE_PATH
from deme_cli.data.images import open_images, to_unit
from deme_cli.diffusion.denoiser import Denoiser, build_network, load_denoiser
from deme_cli.timesteps import parse_range
from deme_cli.training.examples import PixelExamples
from deme_cli.training.setup import Run
from deme_cli.training.train import train

WIDE = {"block_out_channels": [16, 32], "norm_num_groups": 8}


def hand_written(
    denoiser: Denoiser, images: torch.Tensor, config: FinetuneConfig, *, bf16: bool = False
) -> float:
    """Seconds for `config.steps` updates of range 2/4 as one would write them in a notebook.

    images: uint8 (n, C, H, W), on the device of the denoiser.   bf16: networks under autocast.
    """
    device = images.device
    network = copy.deepcopy(denoiser.network).train().requires_grad_(True)
    base, scheduler = denoiser.network, DDPMScheduler.from_config(denoiser.record.scheduler_config)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, power=0.75, foreach=True)
    start = time.perf_counter()
    for _ in range(config.steps):
        x0 = to_unit(images[torch.randint(len(images), (config.batch_size,), device=device)])
        eps = torch.randn_like(x0)
        inside, everywhere = (
            torch.randint(*span, (len(x0),), device=device) for span in ((250, 500), (0, 1000))
        )
        t = torch.where(torch.rand(len(x0), device=device) < config.p, everywhere, inside)
        x_t = scheduler.add_noise(x0, eps, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = network(x_t, t).sample
            with torch.no_grad():
                target = base(x_t, t).sample
        loss = (output - eps).square().mean() + (output - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def deme(denoiser: Denoiser, config: FinetuneConfig, folder: Path) -> float:
    """Seconds for the same updates by `deme_cli.training.train.train`."""
    shape = denoiser.sample_shape
    run = Run(
        denoiser=denoiser,
        choice=parse_range("2/4", 1000),
        examples=PixelExamples(open_images("digits", shape=shape, split="train")),
        held_out=None,
        flip=False,
        config=config,
        output=folder / "expert.safetensors",
    )
    start = time.perf_counter()
    for _ in train(run):
        pass
    seconds = time.perf_counter() - start
    run.output.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    print(machine())
    config = FinetuneConfig(
        steps=options.steps, batch_size=options.batch_size, projection="none", held_out=0
    )
    embedded = load_denoiser(BASE_PATH)
    wide = build_network({**embedded.record.model_config, **WIDE}).eval().requires_grad_(False)
    images = open_images("digits", shape=(1, 8, 8), split="train").batch(range(1438))
    with tempfile.TemporaryDirectory() as folder:
        for name, denoiser in (
            ("embedded base", embedded),
            ("8x8, channels (16, 32)", _with_network(embedded, wide)),
        ):
            seconds = rounds_of(
                {
                    "deme": partial(deme, denoiser, config, Path(folder)),
                    "hand-written": partial(hand_written, denoiser, images, config),
                },
                options.rounds,
            )
            speed = ratios(seconds["hand-written"], seconds["deme"])
            label = f"{name}, batch {options.batch_size}, {options.steps} updates"
            print(verdict(f"{label}: deme / hand-written", speed, ">= 0.95"), flush=True)


def _with_network(denoiser: Denoiser, network: torch.nn.Module) -> Denoiser:
    from dataclasses import replace

    from deme_cli.artifacts import fingerprint

    record = replace(denoiser.record, fingerprint=fingerprint(network.state_dict()))
    return Denoiser(network, denoiser.schedule, record)


if __name__ == "__main__":
    main()
