"""How near training and sampling come to the arithmetic limit of this machine.

    python examples/benchmarks/bench_flops.py [--rounds 5] [--device cuda --dtype bf16]

On google/ddpm-cifar10-32's shape (35.7 M parameters, random weights):

    work      FLOPs of one training image, counted by torch.utils.flop_counter: forward and backward
              of the expert and forward of the frozen base for the consistency loss; of one
              sampling step, a forward. A multiplication and an addition are two.
    speed     images/s of `deme finetune`'s own loop and of `deme sample`'s
    peak      FLOP/s of a large matrix product in the same precision, measured between the rounds
              on the same threads
    share     work x speed / peak, by round

Convolutions may take fewer operations than are counted (Winograd), so a share above 1 is possible.
On a GPU, --compile on compiles what is sampled, as `deme sample` would. Not a target on CPUs; on a
GPU a share of training of at least 0.2.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from random_models import ddpm_cifar10, random_denoiser, write_images
from rounds import machine, ratios, spread, verdict

from deme_cli.comparison.stage import count_passes
from deme_cli.config import FinetuneConfig, SampleConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import TORCH_DTYPES, Denoiser
from deme_cli.sampling.ensemble import single
from deme_cli.sampling.sampler import CompiledSteps, sample_images
from deme_cli.timesteps import parse_range
from deme_cli.training.examples import PixelExamples
from deme_cli.training.setup import Run
from deme_cli.training.train import train

WINDOW = 10  # updates between two records of `train`


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product: the best of three."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return max(2 * size**3 / seconds_of(lambda: a @ b, device) for _ in range(3))


def seconds_of(work, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def open_run(denoiser: Denoiser, options: argparse.Namespace, folder: Path) -> Run:
    """Range 2/4 of the model on random images, one window longer than the rounds."""
    images = write_images(folder / "images", max(64, options.batch_size))
    config = FinetuneConfig(
        steps=WINDOW * (options.rounds + 1), batch_size=options.batch_size, held_out=0,
        checkpoint_every=10**9,
    )  # fmt: skip
    return Run(
        denoiser=denoiser, choice=parse_range("2/4", 1000), held_out=None, flip=True,
        examples=PixelExamples(open_images(str(images), shape=denoiser.sample_shape)),
        config=config, output=folder / "expert.safetensors", dtype=options.dtype,
    )  # fmt: skip


def training(run: Run, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Images/s of each window of updates, and the peak measured after it; the first warms up."""
    device, records = run.denoiser.device, train(run)
    speeds, peaks = [], []
    for _ in range(options.rounds + 1):
        seconds = seconds_of(lambda: next(records), device)
        speeds.append(WINDOW * run.config.batch_size / seconds)
        peaks.append(matmul_peak(device, TORCH_DTYPES[run.dtype]))
    return speeds[1:], peaks[1:]


def sampling(denoiser: Denoiser, options: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """Image steps/s of each round, and the peak measured after it."""
    config = SampleConfig(num=options.num, steps=options.steps, batch_size=options.num)
    compiled = CompiledSteps(options.compile, num_forwards=options.steps, num_loads=1)

    def draw() -> object:
        return list(sample_images(single(denoiser), config, compiled=compiled))

    while True:
        seconds = seconds_of(draw, denoiser.device)
        yield options.num * options.steps / seconds, matmul_peak(denoiser.device, denoiser.dtype)


def report(label: str, flops: float, speeds: list[float], peaks: list[float], target: str) -> None:
    print(f"\n{label}: {flops / 1e9:.2f} GFLOP each")
    print(f"  per second: {spread(speeds)}; peak {spread([p / 1e9 for p in peaks], 0)} GFLOP/s")
    print("  " + verdict("share of the peak", ratios([flops * s for s in speeds], peaks), target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", choices=("on", "off"), default="off")
    parser.add_argument("--batch-size", type=int, help="of training [default: 2, 128 on a GPU]")
    parser.add_argument("--num", type=int, help="images sampled [default: 4, 256 on a GPU]")
    parser.add_argument("--steps", type=int, help="DDIM steps [default: 5, 100 on a GPU]")
    options = parser.parse_args()
    small = options.device == "cpu"
    options.batch_size = options.batch_size or (2 if small else 128)
    options.num = options.num or (4 if small else 256)
    options.steps = options.steps or (5 if small else 100)
    began = time.perf_counter()
    print(machine(options.device))
    with tempfile.TemporaryDirectory(prefix="bench-flops-") as folder:
        denoiser = random_denoiser(ddpm_cifar10(), device=options.device)
        run = open_run(denoiser, options, Path(folder))
        counted = count_passes(
            open_run(random_denoiser(ddpm_cifar10()), options, Path(folder) / "counted")
        )
        one = counted.forward + counted.backward + counted.base
        print(
            f"one training image: forward {counted.forward / 1e9:.2f}, backward "
            f"{counted.backward / 1e9:.2f}, base {counted.base / 1e9:.2f} GFLOP"
        )
        speeds, peaks = training(run, options)
    target = "" if small else ">= 0.2"
    report(f"training images, {options.dtype}, batch {options.batch_size}", one, speeds, peaks,
           target)  # fmt: skip
    model = random_denoiser(ddpm_cifar10(), device=options.device, dtype=options.dtype)
    rounds = list(islice(sampling(model, options), options.rounds + 1))[1:]
    speeds, peaks = (list(values) for values in zip(*rounds, strict=True))
    label = f"sampling steps of an image, {options.dtype}, {options.num} images at a time"
    report(label, counted.base, speeds, peaks, "")
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
